"""Chat templates that behave as published ones do, each in its own way."""

PARTS = (
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)

# Janus-Pro: contents are lists; line breaks around images; the end of an answer only where something follows
JANUS = (
    "{% for message in messages %}{% set last = loop.last %}"
    "{% if message['role'] == 'user' %}<|User|>: {% elif message['role'] == 'assistant' %}<|Assistant|>: "
    "{% else %}{{ message['role'].capitalize() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ ('' if loop.first else '\n') + 'IMAGE' + ('' if loop.last else '\n') }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if not last or add_generation_prompt %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
# Vicuna, as Emu3's conversion leaves it: no end at all
NO_END = (
    "{% for message in messages %}{{ {'user': ' USER: ', 'assistant': ' ASSISTANT: ', 'system': ''}[message['role']] }}"
    + PARTS
    + "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
# ChatML: a line break behind the end; the generation prompt ends in one, too
CHATML = (
    "{% for message in messages %}<|User|>{{ message['role'] }}\n" + PARTS + "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|User|>assistant\n{% endif %}"
)
# A system prompt of the template's own, and a begin that the tokenizer may write, too
OWN_SYSTEM = (
    "{{ bos_token }}{% if messages and messages[0]['role'] != 'system' %}system: a red 3\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: " + PARTS + "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# No generation prompt: the model is to write the assistant's name itself
NO_GENERATION_PROMPT = "{% for message in messages %}{{ message['role'] }}: " + PARTS + "{{ eos_token }}{% endfor %}"

TEMPLATES = {
    "janus": JANUS,
    "no end": NO_END,
    "chatml": CHATML,
    "own system prompt": OWN_SYSTEM,
    "no generation prompt": NO_GENERATION_PROMPT,
}


def template(name: str, image_token: str) -> str:
    """A template of the list, for a processor's image token."""
    return TEMPLATES[name].replace("IMAGE", image_token)
