"""Every number of the embedded world, importable without torch.

Sizes are tokens unless said otherwise. All of it is ours: the papers' models are far too large to train in a demo.
"""

import dataclasses

# The policy's plain template; a base folder has none of its own, so the recipe passes this one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}Q:{{ message['content'] }}\nA:{% endif %}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the world is trained."""

    seed: int = 0
    num_threads: int = 2  # of torch; another number changes the last bits, and with them the models

    # model shape, shared by the base, the instruct and the reward model
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_theta: float = 100.0  # 10,000 leaves derivations at chance after the same number of steps
    initializer_range: float = 0.1

    # base: constant learning rate until the gate passes, then a linear cool-down
    base_pages: int = 16
    base_page_tokens: int = 96
    base_list_share: float = 0.75  # copying is learned from list pages, styles of answering from the rest
    base_lr: float = 3e-3
    base_warmup_steps: int = 50
    base_min_steps: int = 300
    base_max_steps: int = 3000
    base_cooldown_steps: int = 700
    base_cooldown_page_tokens: int = 192
    base_cooldown_list_share: float = 0.35
    base_gate: float = 0.95  # share of questions whose forced derivation is right to the last digit

    # instruct: a short fine-tuning of the base, response tokens only
    instruct_steps: int = 100
    instruct_rows: int = 64
    instruct_lr: float = 4e-4
    instruct_derived_share: float = 0.2  # without any, no merge ratio ever leaves the direct style

    # reward model: Bradley-Terry over prefixes, on short responses until it judges answers, then on long ones
    reward_min_steps: int = 150
    reward_max_steps: int = 800
    reward_long_steps: int = 180
    reward_told: float = 0.9  # share of answers one digit apart that are told apart when the long responses begin
    reward_prompts: int = 16
    reward_lr: float = 1e-3
    reward_max_response: int = 176
    reward_mean_gate: float = 0.85  # share of probe pairs ranked rightly, mean over the kinds of pair
    reward_worst_gate: float = 0.6  # the same in the worst kind (a wrong step below a right answer is the hard one)

    # Mixtral pair of the log-ratio reward: the base upcycled, taught the base's styles, then right derivations too
    pair_experts: int = 4  # of which two are active
    pair_reference_steps: int = 60
    pair_policy_steps: int = 40
    pair_derived_share: float = 0.6  # of what the policy model learns from; the rest bounds what a response can lose
    pair_junk_share: float = 0.15  # of what both learn from
    pair_rows: int = 48
    pair_lr: float = 4e-4

    # prompts handed to the RL run
    train_prompts: int = 4096
    heldout_prompts: int = 128
