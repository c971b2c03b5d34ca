"""The checks of a reward, made before any actor starts."""

from pathlib import Path

from c2f_ray.data.model_folder import check_model
from c2f_ray.data.templates import chat_template
from c2f_ray.data.tokenizer import load_tokenizer
from c2f_ray.data.user_function import load_function
from c2f_ray.errors import RecipeError
from c2f_ray.recipe import FunctionReward, LogRatioReward, Reward, UltraRMReward
from c2f_ray.reward.log_ratio import encode
from c2f_ray.reward.samples import Sample
from c2f_ray.reward.ultrarm import check_ultrarm_folder


def check_reward(reward: Reward) -> None:
    """Raises RecipeError with the problems of all rewards together."""
    problems: list[str] = []
    for name, part in reward.named_parts().items():
        try:
            check_one_reward(reward.part_key(name), part.reward)
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(*problems)


def check_one_reward(key: str, reward: UltraRMReward | LogRatioReward | FunctionReward) -> None:
    if isinstance(reward, FunctionReward):
        load_function(f"{key}.function", reward.function)
        return
    for field in reward.model_signs:
        model = getattr(reward, field)
        config = check_model(f"{key}.{field}", model)
        context = getattr(config, "max_position_embeddings", reward.max_tokens)
        if reward.append_eos != "never" and load_tokenizer(model).eos_token_id is None:
            raise RecipeError(
                f"{key}.append_eos: {reward.append_eos}: the tokenizer of {model} has no end-of-sequence token; set it "
                "to never"
            )
        # An engine generates one token more, which nobody reads.
        most = context - reward.generates
        if reward.max_tokens > most:
            raise RecipeError(
                f"{key}.max_tokens: {reward.max_tokens} is beyond the context of {model}, which has room for {most}; "
                "lower it"
            )
    if isinstance(reward, LogRatioReward):
        check_pair(key, reward)
    elif Path(reward.model).is_dir() and (wrong := check_ultrarm_folder(Path(reward.model))):
        raise RecipeError(f"{key}.model: {reward.model} {wrong}")


def check_pair(key: str, reward: LogRatioReward) -> None:
    """The same token ids go to both models, rendered by the policy model's template."""
    tokenizer = load_tokenizer(reward.policy_model)
    if tokenizer.get_vocab() != load_tokenizer(reward.reference_model).get_vocab():
        raise RecipeError(
            f"{key}.reference_model: {reward.reference_model} has another vocabulary than {reward.policy_model}; a log "
            "ratio compares the probabilities of the same tokens"
        )
    template = chat_template(reward.chat_template, tokenizer, f"{key}.chat_template")
    sample = Sample([{"role": "user", "content": "question"}], "answer", finished=True, record={})
    try:
        encode(reward, tokenizer, template, sample)
    except Exception as error:  # the template's own, and jinja's
        raise RecipeError(f"{key}.chat_template: it cannot render an assistant's message: {error}") from None
