"""Adapters as folders and Hub repos.

model.py loads and saves adapters. base.py loads the base that an adapter names. push.py pushes a folder. card.py writes the
README of a repo.
"""
