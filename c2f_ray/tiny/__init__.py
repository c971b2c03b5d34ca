"""The tiny world: a task, two tokenizers and small trained models, so that the whole chain runs on a laptop CPU.

The models ship as data in `c2f_ray/tiny/data`; recipes name them as `tiny:base`, `tiny:reward` and so on.
`c2f_ray.tiny.train` made them. Everything exported here imports without torch or transformers.
"""

from c2f_ray.tiny.settings import CHAT_TEMPLATE, Settings
from c2f_ray.tiny.task import Question, accuracy, draw_question, is_heldout, parse_question, utility

__all__ = [
    "CHAT_TEMPLATE",
    "Question",
    "Settings",
    "accuracy",
    "draw_question",
    "is_heldout",
    "parse_question",
    "utility",
]
