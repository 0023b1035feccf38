"""`SteeredPipeline` gives what transformers' pipeline gives inside the steering, in every form of call."""

from threading import Thread

import pytest
import torch
from patience import HANG_SECONDS
from transformers import GenerationConfig, TextGenerationPipeline, TextIteratorStreamer

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import (
    LatentEdit,
    PrefixEdit,
    SteeredPipeline,
    Steering,
    SteeringError,
    push_steering,
    save_steering,
)
from hf_msae.worlds.stories import load_story_lm

pytestmark = pytest.mark.slow

PROMPTS = ["Once upon a time, there was a little owl.", "Lily went to the", "It was a sunny day"]
STEERING = Steering([LatentEdit(5, 3.0), LatentEdit(9, 1.0, "clamp")], name="strong")
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def story_lm():
    return load_story_lm()


@pytest.fixture(scope="module")
def story_sae(story_lm) -> MatryoshkaSAE:
    """Untrained, but of the story model and with its maxima measured."""
    model, tokenizer = story_lm
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=128, num_latents=64, k=4, site="layers.2", base_model="stories")
    sae = MatryoshkaSAE(config).eval()
    site = resolve_site(model, "layers.2")
    x = capture(model, [site], **tokenizer(PROMPTS[0], return_tensors="pt"))[site][0, 1:]
    sae.calibrate_threshold([x])
    sae.max_activation.copy_(sae.encode(x).amax(0).clamp_min(5.0))
    return sae


@pytest.fixture
def pipe(story_lm, story_sae) -> SteeredPipeline:
    model, tokenizer = story_lm
    return SteeredPipeline(model, tokenizer, story_sae, STEERING)


def test_it_is_the_pipeline_of_transformers_inside_the_steering(pipe, story_lm, story_sae):
    model, tokenizer = story_lm
    ordinary = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    with STEERING.on(model, story_sae, pipe.special_ids):
        expected = ordinary(PROMPTS[0], **GREEDY)
    assert pipe(PROMPTS[0], **GREEDY) == expected
    plain = ordinary(PROMPTS[0], **GREEDY)
    assert plain != expected
    assert pipe.with_steering(Steering())(PROMPTS[0], **GREEDY) == plain
    assert pipe.steering is STEERING


def test_a_batch_gives_what_single_prompts_give(pipe):
    alone = [pipe(prompt, **GREEDY) for prompt in PROMPTS]
    assert pipe(PROMPTS, batch_size=3, **GREEDY) == alone
    assert list(pipe((prompt for prompt in PROMPTS), batch_size=2, **GREEDY)) == alone
    assert [len(texts) for texts in pipe(PROMPTS[:2], num_return_sequences=2, num_beams=2, **GREEDY)] == [2, 2]


def test_only_new_text_and_tokens(pipe):
    full = pipe(PROMPTS[1], **GREEDY)[0]["generated_text"]
    new = pipe(PROMPTS[1], return_full_text=False, **GREEDY)[0]["generated_text"]
    assert full == PROMPTS[1] + new
    assert len(pipe(PROMPTS[1], return_tensors=True, **GREEDY)[0]["generated_token_ids"]) == 5 + 8


def test_chats_are_steered_but_not_their_marks(lm, build_tokenizer, make_sae):
    tokenizer = build_tokenizer()
    sae = make_sae(lm, "layers.0")
    pipe = SteeredPipeline(lm, tokenizer, sae, Steering([LatentEdit(3, 9.0)]))
    chat = [{"role": "user", "content": "w1 w2"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with pipe.steering.on(lm, sae, set(tokenizer.all_special_ids)):
        out = lm.generate(**ids, do_sample=False, max_new_tokens=4, pad_token_id=0)
    answer = pipe(chat, do_sample=False, max_new_tokens=4)[0]["generated_text"]
    assert answer[0] == chat[0]
    assert answer[1]["role"] == "assistant"
    new = out[0, ids.input_ids.shape[1] :]
    assert answer[1]["content"] == tokenizer.decode(new, skip_special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|mark|>") in pipe.special_ids


def test_a_streamer_gets_the_steered_text_from_another_thread(pipe):
    expected = pipe(PROMPTS[0], return_full_text=False, **GREEDY)[0]["generated_text"]
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=HANG_SECONDS)
    thread = Thread(target=pipe, args=(PROMPTS[0],), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_requests_at_once_get_their_own_steering_and_seed(pipe):
    steerings = [STEERING, Steering(), Steering([PrefixEdit(0)]), Steering([LatentEdit(5, -3.0)])]
    options = {"max_new_tokens": 12, "temperature": 1.0}

    def run(index: int) -> str:
        return pipe.with_steering(steerings[index])(PROMPTS[0], seed=index, **options)[0]["generated_text"]

    alone = [run(index) for index in range(4)]
    assert len(set(alone)) == 4
    found: dict[int, list[str]] = {index: [] for index in range(4)}
    threads = [Thread(target=lambda i=i: found[i].extend(run(i) for _ in range(3))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [alone[index]] * 3 for index in range(4)}


def test_a_seed_fixes_the_text_and_nothing_else(pipe):
    state = torch.get_rng_state()
    first = pipe(PROMPTS[0], seed=3, max_new_tokens=20)
    assert pipe(PROMPTS[0], seed=3, max_new_tokens=20) == first
    assert pipe(PROMPTS[0], seed=4, max_new_tokens=20) != first
    assert torch.equal(torch.get_rng_state(), state)
    greedy = pipe(PROMPTS[0], **GREEDY)
    assert pipe(PROMPTS[0], seed=3, **GREEDY) == greedy
    assert pipe(PROMPTS[0], seed=3, temperature=0, max_new_tokens=8) == greedy
    assert pipe(PROMPTS[0], seed=3, top_k=1, max_new_tokens=8) == greedy
    batch = pipe([PROMPTS[0]] * 2, seed=3, max_new_tokens=20, batch_size=2)
    assert batch == [first, pipe(PROMPTS[0], seed=4, max_new_tokens=20)]


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_beams": 2}])
def test_a_seed_is_for_one_answer(pipe, options):
    name, number = next(iter(options.items()))
    with pytest.raises(SteeringError, match=rf"one answer to each prompt, got {name}={number}; call once"):
        pipe(PROMPTS[0], seed=3, **options)
    config = GenerationConfig(max_new_tokens=8, do_sample=True, **options)
    with pytest.raises(SteeringError, match=f"got {name}={number}"):
        pipe(PROMPTS[0], seed=3, generation_config=config)
    if name == "num_beams":  # nothing is sampled
        assert pipe(PROMPTS[0], seed=3, **options, **GREEDY) == pipe(PROMPTS[0], **options, **GREEDY)


def test_it_loads_from_a_folder_with_its_language_model(tmp_path, pipe, story_sae):
    story_sae.save_pretrained(tmp_path)
    save_steering(STEERING, tmp_path)
    loaded = SteeredPipeline.from_pretrained(tmp_path)
    assert loaded(PROMPTS[0], **GREEDY) == pipe(PROMPTS[0], **GREEDY)
    assert loaded.steering == STEERING


def test_it_loads_from_the_hub_several_saes_of_one_model(hub, story_lm, story_sae):
    for name in ("a", "b"):
        story_sae.push_to_hub("tester/stories", subfolder=name)
    steering = Steering([LatentEdit(5, 2.0, sae="a"), LatentEdit(9, 2.0, sae="b")])
    push_steering(steering, "tester/stories")
    model, tokenizer = story_lm
    loaded = SteeredPipeline.from_pretrained("tester/stories", model=model, tokenizer=tokenizer)
    together = SteeredPipeline(model, tokenizer, story_sae, Steering([LatentEdit(5, 2.0), LatentEdit(9, 2.0)]))
    assert sorted(loaded.saes) == ["a", "b"]
    assert loaded(PROMPTS[0], **GREEDY) == together(PROMPTS[0], **GREEDY)


def test_what_is_missing_is_said(tmp_path, story_lm, make_sae, llama):
    sae = make_sae(llama)
    sae.save_pretrained(tmp_path)
    with pytest.raises(SteeringError, match=r"has no steering\.json"):
        SteeredPipeline.from_pretrained(tmp_path)
    save_steering(Steering([LatentEdit(5, 2.0)]), tmp_path)
    with pytest.raises(SteeringError, match="does not say which one language model it steers; give model="):
        SteeredPipeline.from_pretrained(tmp_path)
    with pytest.raises(SteeringError, match="give the tokenizer of the LlamaForCausalLM, too"):
        SteeredPipeline.from_pretrained(tmp_path, model=llama)
