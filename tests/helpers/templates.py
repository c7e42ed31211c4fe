"""Chat templates of several kinds, with the tiny tokenizer's special tokens."""

from tests.helpers.tiny import CHAT_TEMPLATE

TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default system": CHAT_TEMPLATE.replace(
        "{% for m",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}{% for m",
        1,
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[INST] {{ m['content'] | trim }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} <|im_end|>"
        "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "<|im_start|>{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}[assistant]{{ m['content'].split('</think>')[-1] }}"
        "<|im_end|>{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    ),
    "gemma": (
        "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "none": None,
}
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the thinking of all turns but the last, as those of reasoning models do."""
