"""Adapters as Hub repos: what is pulled is whole and verified, what is pushed is complete, or the user is told why not.

folder.py: an adapter's folder on disk. pull.py and push.py: to and from the Hub. card.py: its README. faults.py: what a Hub
answers, in words that help.
"""
