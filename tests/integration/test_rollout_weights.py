"""Two CPU engines, and a sender that holds a transformers model: the engines compute with what was sent."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from c2f_ray.data.trajectory import Ragged, Trajectories
from c2f_ray.errors import ActorDiedError, C2FError, DeadlineError, WeightMismatchError
from c2f_ray.recipe import Recipe, Weights
from c2f_ray.rollout.actor import Begun, RolloutRequest
from c2f_ray.rollout.pool import RolloutPool
from c2f_ray.weights.source import ModuleWeights
from c2f_ray.weights.transfer import WeightSender

VOCAB, EOS, LONG_PROMPT = 67, 2, 300  # the CPU engine's KV block is 128 tokens
PROMPT_LENGTHS = [LONG_PROMPT, 5, 21, 64, 130, 9]
MAX_MODEL_TOKENS = 400
SHARD = 4


@ray.remote
class Sender:
    """As a learner rank would: a module, and a WeightSender over it."""

    def __init__(self, folder: Path) -> None:
        self.model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def connect(self, actors, timeout_s):
        # 1 MiB buckets cut this model into 3, in the middle of its fused layers.
        weights = Weights(bucket_mib=1, timeout_s=timeout_s)
        source = ModuleWeights(self.model, torch.float32)
        self.sender = WeightSender(source, weights, gpus_per_actor=0, rank=0)
        self.sender.connect(actors)

    def send(self, version):
        self.sender.send(version)

    def take_weights_of(self, folder):
        other = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(other.state_dict())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of one architecture with different weights."""
    root = tmp_path_factory.mktemp("models")
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0")
    for seed in range(3):
        torch.manual_seed(seed)
        MistralForCausalLM(config).save_pretrained(root / str(seed))
        tokenizer.save_pretrained(root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def prompts():
    numbers = np.random.default_rng(0)
    rows = [numbers.integers(3, VOCAB, length) for length in PROMPT_LENGTHS]
    return Ragged.from_rows([*rows, np.array([VOCAB + 9])], np.int32)  # the last has a token that there is not


@pytest.fixture(scope="module")
def recipe(folders):
    return Recipe.model_validate(
        {
            "run": {"name": "test", "steps": 1},
            "policy": {"model": str(folders[0]), "dtype": "float32"},
            "prompts": {"source": "unused.jsonl"},
            "length": {"rule": "fixed", "max_tokens": 60},
            "rollout": {
                "actors": 2,
                "gpus_per_actor": 0,
                "shard_samples": SHARD,
                "temperature": 0.8,
                "top_p": 0.95,
                "memory": 0.125,
            },
            "reward": {"kind": "ultrarm", "model": "unused"},
            "learner": {"algorithm": "remax", "gpus_per_rank": 0, "optimizer": {"lr": 1e-4}},
        }
    )


@pytest.fixture(scope="module")
def pool(cluster, recipe, prompts):
    pool = RolloutPool(recipe, ray.put(prompts), MAX_MODEL_TOKENS, load_format="dummy")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def sender(cluster, pool, folders):
    sender = Sender.remote(folders[1])
    pool.wait_until_ready()
    return sender


@pytest.fixture(scope="module")
def connected(pool, sender):
    """Engines that have been asked for the long prompt with the weights of folder 1, and hold them."""
    ray.get(sender.connect.remote(pool.actors, 60.0))
    ray.get(sender.send.remote(1))
    return sender


def request(sample_id: int, prompt_row: int, greedy: bool = False) -> RolloutRequest:
    return RolloutRequest(sample_id, prompt_row, seed=2**62 + sample_id, greedy=greedy)


def in_order(shards: list[Trajectories]) -> Trajectories:
    batch = Trajectories.concat(shards)
    return batch.select(np.argsort(batch.info.sample_id))


def collect(shards) -> Trajectories:
    return in_order([ray.get(shard) for shard, _ in shards])


def generate_alone(actor, requests, max_tokens, ordered=False) -> Trajectories:
    items = [ray.get(item) for item in actor.generate.remote(requests, max_tokens, ordered)]
    return in_order([item for item in items if isinstance(item, Trajectories)])


def reference_logprobs(folder: Path, prompt, response) -> np.ndarray:
    model = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def largest_error(folder: Path, batch: Trajectories) -> float:
    rows = range(len(batch))
    errors = [reference_logprobs(folder, batch.prompt[i], batch.response[i]) - batch.sampler_logprobs[i] for i in rows]
    return max(float(np.abs(error).max()) for error in errors)


def engine_tensors(actor) -> dict[str, torch.Tensor]:
    """The engine's parameters under Hugging Face names: fused layers taken apart, vocabulary padding dropped."""

    def read(self):
        return self.llm.apply_model(lambda model: {k: v.detach().clone() for k, v in model.named_parameters()})[0]

    tensors = ray.get(actor.__ray_call__.remote(read))
    parts = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            split = zip(("q_proj", "k_proj", "v_proj"), tensor.split([128, 64, 64]), strict=True)
            parts |= {name.replace("qkv_proj", part): value for part, value in split}
        elif "gate_up_proj" in name:
            split = zip(("gate_proj", "up_proj"), tensor.split([352, 352]), strict=True)
            parts |= {name.replace("gate_up_proj", part): value for part, value in split}
        elif "embed_tokens" in name or "lm_head" in name:
            assert tensor.shape == (128, 128) and not tensor[VOCAB:].any()
            parts[name] = tensor[:VOCAB]
        else:
            parts[name] = tensor
    return parts


def assert_same_weights(actor, folder: Path) -> None:
    expected = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    actual = engine_tensors(actor)
    assert actual.keys() == expected.keys() and len(actual) == 30
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_an_engine_with_dummy_weights_refuses(pool, sender):
    with pytest.raises(C2FError, match="no weights"):
        list(pool.generate([request(0, 0)], 5, ordered=False))


def test_an_engine_that_cannot_be_built_is_an_error_that_says_why(cluster, recipe, prompts, tmp_path):
    broken = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"model": str(tmp_path)})})
    pool = RolloutPool(broken, ray.put(prompts), MAX_MODEL_TOKENS, load_format="auto")
    with pytest.raises(ActorDiedError, match="one could not build its engine") as error:
        pool.wait_until_ready()
    pool.close()
    assert str(tmp_path) in str(error.value)


def test_every_transfer_arrives_bit_for_bit(pool, connected, folders):
    for actor in pool.actors:
        assert_same_weights(actor, folders[1])
    ray.get(connected.take_weights_of.remote(folders[2]))
    ray.get(connected.send.remote(2))
    for actor in pool.actors:
        assert_same_weights(actor, folders[2])
    ray.get(connected.take_weights_of.remote(folders[1]))
    ray.get(connected.send.remote(3))


def test_one_flipped_bit_in_an_engine_is_found(pool, connected):
    actor = pool.actors[1]

    def flip(model):
        model.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)[3, 5] ^= 1

    def spoil(self):
        self.real_finish = self.llm.finish_weight_update
        self.llm.finish_weight_update = lambda: (self.real_finish(), self.llm.apply_model(flip))

    def repair(self):
        self.llm.finish_weight_update = self.real_finish

    ray.get(actor.__ray_call__.remote(spoil))
    with pytest.raises(WeightMismatchError, match="transfer 8: this engine's checksum"):
        ray.get(connected.send.remote(8))
    with pytest.raises(C2FError, match="no weights"):
        generate_alone(actor, [request(0, 1)], 5)
    ray.get(actor.__ray_call__.remote(repair))
    ray.get(connected.send.remote(3))


def test_logprobs_are_those_of_the_new_weights_for_a_prompt_already_cached(pool, connected, folders):
    requests = [request(0, 0), request(1, 0), request(2, 1)]
    before = collect(pool.generate(requests, 20, ordered=True))
    assert largest_error(folders[1], before) < 1e-4
    ray.get(connected.take_weights_of.remote(folders[2]))
    ray.get(connected.send.remote(4))
    after = collect(pool.generate(requests, 20, ordered=True))
    assert after.info.weight_version.tolist() == [4, 4, 4]
    assert largest_error(folders[2], after) < 1e-4
    assert largest_error(folders[1], after) > 0.1


def test_without_the_reset_the_same_measurement_would_be_off(pool, connected, folders):
    actor = pool.actors[0]

    def disable(self):
        self.real_reset, self.reset_prefix_cache = self.reset_prefix_cache, lambda: None

    def enable(self):
        self.reset_prefix_cache = self.real_reset
        self.reset_prefix_cache()

    generate_alone(actor, [request(0, 0)], 20)
    ray.get(actor.__ray_call__.remote(disable))
    ray.get(connected.take_weights_of.remote(folders[1]))
    ray.get(connected.send.remote(5))
    stale = generate_alone(actor, [request(0, 0)], 20)
    ray.get(actor.__ray_call__.remote(enable))
    fresh = generate_alone(actor, [request(0, 0)], 20)
    assert largest_error(folders[1], stale) > 1e-3
    assert largest_error(folders[1], fresh) < 1e-4


def test_an_interrupted_sample_goes_on_with_new_weights(pool, connected, folders):
    """No key or value of the old weights is reused, each token's version is known, and nothing is sampled twice."""

    def wait_in_step_8(self):
        """Whatever the machine does meanwhile, the interruption comes when each sample has about eight tokens."""
        import time

        self.real_step, self.steps = self.llm.llm_engine.step, 0

        def step():
            self.steps += 1
            while self.steps == 8 and not self.interrupted_call:
                time.sleep(0.001)
            return self.real_step()

        self.llm.llm_engine.step = step

    def repair(self):
        self.llm.llm_engine.step = self.real_step

    ray.get([actor.__ray_call__.remote(wait_in_step_8) for actor in pool.actors])
    ray.get(connected.take_weights_of.remote(folders[1]))
    ray.get(connected.send.remote(6))
    requests = [request(n, n % 6) for n in range(24)]
    asked = []
    found = list(pool.generate(requests, 60, ordered=False, stop=lambda: len(asked) == 2 or asked.append(None)))
    ray.get([actor.__ray_call__.remote(repair) for actor in pool.actors])
    cut = {
        sample_id: Begun(shard, row)
        for shard, info in found
        if info.interrupted.any()
        for row, sample_id in enumerate(info.sample_id.tolist())
    }
    first = in_order([ray.get(shard) for shard, _ in found])
    assert first.info.sample_id.tolist() == list(range(24))
    assert set(np.flatnonzero(first.info.interrupted).tolist()) == set(cut) != set()
    assert not first.info.finished[list(cut)].any()
    assert largest_error(folders[1], first) < 1e-4

    ray.get(connected.take_weights_of.remote(folders[2]))
    ray.get(connected.send.remote(7))
    rest = [replace(each, begun=cut[each.sample_id]) for each in requests if each.sample_id in cut]
    last = collect(pool.generate(rest, 60, ordered=False))
    assert last.info.sample_id.tolist() == sorted(cut)
    assert not last.info.interrupted.any()
    assert (last.info.finished | (last.info.response_tokens == 60)).all()
    for row, sample_id in enumerate(last.info.sample_id):
        old = len(first.response[sample_id])
        assert last.response[row][:old].tolist() == first.response[sample_id].tolist()
        new = len(last.response[row]) - old
        assert last.token_version[row].tolist() == [6] * old + [7] * new
        assert last.info.weight_version[row] == (6 if old else 7)
        before, after = (reference_logprobs(folder, last.prompt[row], last.response[row]) for folder in folders[1:])
        assert np.abs(last.sampler_logprobs[row][:old] - before[:old]).max(initial=0) < 1e-4
        assert np.abs(last.sampler_logprobs[row][old:] - after[old:]).max(initial=0) < 1e-4
    assert any(0 < len(first.response[n]) < 60 for n in cut)
    ray.get(connected.take_weights_of.remote(folders[1]))
    ray.get(connected.send.remote(9))


def test_a_request_gives_the_same_tokens_in_any_company(pool, connected):
    requests = [request(i, i % len(PROMPT_LENGTHS), greedy=i % 3 == 0) for i in range(24)]
    together = collect(pool.generate(requests, 60, ordered=True))
    alone = generate_alone(pool.actors[1], requests[::-1], 60)
    assert together.info.sample_id.tolist() == alone.info.sample_id.tolist() == list(range(24))
    assert alone.response.values.tolist() == together.response.values.tolist()
    np.testing.assert_allclose(alone.sampler_logprobs.values, together.sampler_logprobs.values, atol=2e-5)


def test_ordered_shards_hold_consecutive_samples_and_the_driver_sees_them_whole(pool, connected):
    requests = [request(100 + i, i // 2, greedy=i % 2 == 1) for i in range(12)]
    shards = list(pool.generate(requests, 60, ordered=True))
    ids = sorted(info.sample_id.tolist() for _, info in shards)
    # Six requests to each actor, two of each prompt together: shards of 4 and 2.
    assert ids == [[100, 101, 102, 103], [104, 105], [106, 107, 108, 109], [110, 111]]
    for reference, info in shards:
        shard = ray.get(reference)
        assert shard.info.sample_id.tolist() == info.sample_id.tolist()
        assert shard.response.lengths.tolist() == info.response_tokens.tolist()
        assert shard.prompt.lengths.tolist() == [PROMPT_LENGTHS[row] for row in info.prompt_row]
        assert info.greedy.tolist() == [bool(i % 2) for i in range(len(info))]


def test_unordered_shards_come_in_the_order_of_finishing(pool, connected):
    requests = [request(i, 1 + i // 4) for i in range(16)]
    shards = list(pool.generate(requests, 60, ordered=False))
    # The engine starts all requests at once, so that a shorter response finishes sooner.
    for numbers in (range(8), range(8, 16)):
        lengths = [sorted(info.response_tokens) for _, info in shards if info.sample_id[0] in numbers]
        assert [len(shard) for shard in lengths] == [4, 4]
        assert lengths[0][0] < lengths[0][-1] <= lengths[1][0]


def test_greedy_is_that_of_transformers_and_ends_with_eos(pool, connected, folders):
    batch = generate_alone(pool.actors[0], [request(i, i, greedy=True) for i in range(6)], 60)
    model = MistralForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    for row in range(6):
        prompt = torch.tensor(batch.prompt[row], dtype=torch.long)[None]
        expected = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, prompt.shape[1] :]
        assert batch.response[row].tolist() == expected.tolist()


def test_finished_means_that_the_last_token_is_eos(pool, connected):
    requests = [request(i, i % 6) for i in range(32)]
    long = collect(pool.generate(requests, 60, ordered=True))
    short = collect(pool.generate(requests, 7, ordered=True))
    responses = [long.response[i].tolist() for i in range(32)]
    finished = [response[-1] == EOS for response in responses]
    assert 3 <= sum(finished) <= 29
    assert long.info.finished.tolist() == finished
    assert all(EOS not in response[:-1] for response in responses)
    assert all(len(response) == 60 for response, done in zip(responses, finished, strict=True) if not done)
    # A smaller limit cuts the same responses.
    assert [short.response[i].tolist() for i in range(32)] == [response[:7] for response in responses]
    assert short.info.finished.tolist() == [len(response) <= 7 and response[-1] == EOS for response in responses]


def test_a_limit_beyond_the_engine_is_refused(pool, connected):
    with pytest.raises(C2FError, match="300 tokens and max_tokens 101 exceed the engine's 400"):
        list(pool.generate([request(0, 0)], 101, ordered=False))


def test_a_request_that_vllm_refuses_leaves_nothing_behind(pool, connected):
    with pytest.raises(RayTaskError, match="out of vocabulary"):
        list(pool.generate([request(0, 1), request(1, 2), request(2, len(PROMPT_LENGTHS))], 60, ordered=True))
    assert collect(pool.generate([request(5, 3)], 5, ordered=True)).info.sample_id.tolist() == [5]
    idle = [
        actor.__ray_call__.remote(lambda self: self.llm.llm_engine.has_unfinished_requests()) for actor in pool.actors
    ]
    assert ray.get(idle) == [False, False]


def test_another_folder_of_the_same_architecture_can_be_loaded(pool, connected, folders, prompts):
    actor = pool.actors[0]
    generate_alone(actor, [request(0, 0)], 5)
    ray.get(actor.load_folder.remote(str(folders[0]), prompts))
    assert_same_weights(actor, folders[0])
    batch = generate_alone(actor, [request(0, 0)], 20)
    assert batch.info.weight_version.tolist() == [0]
    assert largest_error(folders[0], batch) < 1e-4


def test_missing_rollouts_are_named_at_the_deadline(pool, connected, monkeypatch):
    monkeypatch.setattr(pool, "timeout_s", 0.01)
    owing = "rollout actor 0: 20 of 20 samples; rollout actor 1: 20 of 20 samples"
    with pytest.raises(DeadlineError, match=owing):
        list(pool.generate([request(i, i // 20) for i in range(40)], 60, ordered=False))


@ray.remote
class Silent:
    """An actor that takes a call and never answers."""

    def init_weight_transfer_engine(self, init_info):
        time.sleep(60)


def test_a_peer_that_never_comes_is_named_at_the_deadline(pool, connected):
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"joining.*\n(.*\n)?.*rollout actor 1: no answer after [456]"):
        ray.get(connected.connect.remote([pool.actors[0], Silent.options(num_cpus=0).remote()], 4.0))
    assert 3.5 < time.monotonic() - began < 9


def test_a_peer_that_died_is_named_and_the_survivor_refuses(pool, connected):
    ray.get(connected.connect.remote(pool.actors, 6.0))

    def die_while_receiving(self):
        self.llm.update_weights = lambda request: os._exit(1)

    ray.get(pool.actors[1].__ray_call__.remote(die_while_receiving))
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"receiving(.*\n)*.*rollout actor 1: the actor is dead"):
        ray.get(connected.send.remote(9))
    assert time.monotonic() - began < 10
    with pytest.raises(C2FError, match="no weights"):
        generate_alone(pool.actors[0], [request(0, 1)], 5)
    # A new group of the survivors works.
    ray.get(connected.connect.remote(pool.actors[:1], 30.0))
    ray.get(connected.send.remote(10))
    assert generate_alone(pool.actors[0], [request(0, 1)], 5).info.weight_version.tolist() == [10]
    with pytest.raises(ActorDiedError, match="rollout actor 1, which owes 3 samples: an actor died"):
        list(pool.generate([request(i, i // 3) for i in range(6)], 5, ordered=False))
