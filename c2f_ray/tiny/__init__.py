"""The embedded world: a task, two tokenizers and three tiny models, so that the whole chain runs on a laptop CPU.

`build_world(folder)` trains them. Everything exported here imports without torch or transformers; the tokenizers and
models are in `c2f_ray.tiny.tokenizer` and `c2f_ray.tiny.models`.
"""

from c2f_ray.tiny.settings import CHAT_TEMPLATE, Settings, make_settings
from c2f_ray.tiny.task import Question, accuracy, draw_question, is_heldout, parse_question, utility
from c2f_ray.tiny.world import WorldError, build_world

__all__ = [
    "CHAT_TEMPLATE",
    "Question",
    "Settings",
    "WorldError",
    "accuracy",
    "build_world",
    "draw_question",
    "is_heldout",
    "make_settings",
    "parse_question",
    "utility",
]
