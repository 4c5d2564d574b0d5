"""The mathematics of sampling on nets with known answers, and promises about seeds and batches."""

import math
import warnings

import pytest
import torch
from PIL import Image

import sampler
from conftest import TINY, Failing, Recorder, relative_error
from convert_weights import UserError
from model import Text, patchify, unpatchify


class PointNet:
    """The exact velocity if the data is one point: x_t = t data + (1 - t) noise."""

    def __init__(self, data):
        self.data = data

    def __call__(self, x, t, text):
        return (self.data - x) / (1 - t).view(-1, *[1] * (x.ndim - 1))


class TextNet:
    """A net whose velocity is its text, a number; it counts its calls."""

    def __init__(self):
        self.texts = []

    def __call__(self, x, t, text):
        self.texts.append(text)
        return torch.full_like(x, text)


# --- Conventions ----------------------------------------------------------------------------------


def test_data_and_noise_estimates_on_the_linear_path():
    data, noise = torch.randn(2, 3, 16, dtype=torch.float64).unbind()
    for t in torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64):
        x = t * data + (1 - t) * noise
        v = PointNet(data)(x, t.expand(3), None)
        torch.testing.assert_close(v, data - noise)
        torch.testing.assert_close(x + (1 - t) * v, data)
        torch.testing.assert_close(x - t * v, noise)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_euler_is_exact_on_the_linear_path(steps):
    data, noise = torch.randn(2, 3, 4, 2, 2).unbind()
    x = sampler.sample(PointNet(data), noise, None, sampler.time_schedule(steps, 3.0))
    assert relative_error(x, data) < 1e-5


def test_sample_on_plain_points():
    """Any callable is a net and any shape a batch: a small network on 2-D points, say."""
    x = sampler.sample(TextNet(), torch.zeros(5, 2), 3.0, sampler.time_schedule(4, 1.0))
    torch.testing.assert_close(x, torch.full((5, 2), 3.0))


@pytest.mark.parametrize("steps, shift", [(1, 1e-9), (1, 1e-7), (0, 3.0), (4, 0.0), (50, 1e9)])
def test_schedules_that_do_not_lead_from_noise_to_data(steps, shift):
    with pytest.raises(sampler.UserError, match="no schedule"):
        sampler.time_schedule(steps, shift)


def test_time_schedule_by_hand():
    # sigma = 3u / (1 + 2u) for u = 1, 7/8, ..., 1/8, then 0; t = 1 - sigma
    by_hand = [0, 1 / 22, 1 / 10, 1 / 6, 1 / 4, 5 / 14, 1 / 2, 7 / 10, 1]
    times = sampler.time_schedule(8, 3.0)
    torch.testing.assert_close(times, torch.tensor(by_hand), atol=1e-7, rtol=0)
    assert sampler.time_schedule(1, 3.0).tolist() == [0, 1]
    torch.testing.assert_close(sampler.time_schedule(5, 1.0), torch.linspace(0, 1, 6))


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 1000])
def test_times_rise_from_0_to_1(steps):
    times = sampler.time_schedule(steps, 6.0)
    assert len(times) == steps + 1
    assert times.dtype == torch.float32
    assert (times.diff() > 0).all()
    assert (times[0], times[-1]) == (0, 1)


@pytest.mark.parametrize("steps, shift", [
    (0, 3.0), (-1, 3.0), (8, 0.0), (8, -1.0), (1, -1.0), (8, math.nan), (8, math.inf), (8, 1e300)])
def test_bad_schedules(steps, shift):
    with pytest.raises(UserError):
        sampler.time_schedule(steps, shift)


def test_patchify():
    """A token is its 2x2 patch in the order row, column, channel; unpatchify takes it back."""
    x = torch.randn(2, 16, 6, 4)
    tokens = patchify(x)
    assert tokens.shape == (2, 6, 64)
    second_row_and_column = x[1, :, 2:4, 2:4].permute(1, 2, 0).flatten()
    torch.testing.assert_close(tokens[1, 3], second_row_and_column)
    assert torch.equal(unpatchify(tokens, 6, 4), x)


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, negative, guidance, normalization, expected", [
    (2.0, 1.0, 3.0, False, 5.0),        # 2 + 3 (2 - 1)
    (2.0, 1.0, 3.0, True, 2.0),         # as long as v again
    (2.0, 1.0, 3.0, 1.5, 3.0),          # 1.5 times as long
    (2.0, 3.0, 1.0, True, 1.0),         # never lengthened
    (0.0, 0.0, 3.0, True, 0.0)])        # nor divided by zero
def test_guidance(text, negative, guidance, normalization, expected):
    """One step of `sample` from zeros goes along the guided velocity."""
    x = sampler.sample(TextNet(), torch.zeros(2, 4), text, torch.tensor([0.0, 1.0]), guidance,
                       negative, cfg_normalization=normalization)
    torch.testing.assert_close(x, torch.full((2, 4), expected))


def test_cost_of_guidance():
    """Guidance doubles the calls while t <= cfg_truncation; at 0 the negative is never called."""
    times, noise = sampler.time_schedule(8, 3.0), torch.zeros(3, 2)
    net = TextNet()
    sampler.sample(net, noise, 1.0, times)
    assert net.texts == [1.0] * 8
    net = TextNet()
    sampler.sample(net, noise, 1.0, times, guidance=2.0, negative=-1.0, cfg_truncation=0.3)
    assert net.texts == [1.0, -1.0] * 5 + [1.0] * 3
    with pytest.raises(ValueError):
        sampler.sample(net, noise, 1.0, times, guidance=2.0)


@pytest.mark.parametrize("every, steps, negatives", [(1, 8, 8), (2, 8, 4), (2, 7, 4), (3, 8, 3)])
def test_reused_guidance_saves_calls(every, steps, negatives):
    net, times = TextNet(), sampler.time_schedule(steps, 3.0)
    x = sampler.sample(net, torch.zeros(3, 2), 1.0, times, guidance=2.0, negative=-1.0,
                       guidance_every=every)
    assert net.texts.count(-1.0) == negatives
    assert net.texts.count(1.0) == steps
    torch.testing.assert_close(x, torch.full((3, 2), 5.0))       # the difference is constant here


def test_reused_guidance_is_that_of_the_step_before():
    """With v = t and v_negative = 0 the difference of every even step is used twice."""
    class TimeNet:
        def __call__(self, x, t, text):
            return t[:, None] * text * torch.ones_like(x)

    times = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    x = sampler.sample(TimeNet(), torch.zeros(1, 1), 1.0, times, guidance=2.0, negative=0.0,
                       guidance_every=2)
    expected = 0.25 * ((0 + 0) + (0.25 + 0) + (0.5 + 1.0) + (0.75 + 1.0))
    assert float(x) == pytest.approx(expected)


def test_each_text_is_encoded_and_prepared_once(pipeline, monkeypatch):
    encode, prepare = Recorder(pipeline.text_encoder.forward), Recorder(pipeline.dit.prepare)
    forward = Recorder(pipeline.dit.forward)
    monkeypatch.setattr(pipeline.text_encoder, "forward", encode)
    monkeypatch.setattr(pipeline.dit, "prepare", prepare)
    monkeypatch.setattr(pipeline.dit, "forward", forward)
    sampler.generate(pipeline, ["a cat"] * 3, 32, 32, steps=4)
    assert [len(ids) for ids, _ in encode.calls] == [1]          # one prompt for three images
    assert len(prepare.calls) == 1
    assert [len(x) for x, _, _ in forward.calls] == [3] * 4
    assert all(text.mask is None for _, _, text in forward.calls)
    sampler.generate(pipeline, ["a cat"], 32, 32, steps=4, guidance=1.0, negative_prompt="dog")
    assert len(encode.calls) == 3
    assert len(prepare.calls) == 3
    assert len(forward.calls) == 4 + 8


# --- Batches, seeds, masks ------------------------------------------------------------------------

PROMPTS = ["a cat", "", "a dog on a red sofa",
           "Neon sign “造相 Z-Image” at night, rain, 西安大雁塔 in the distance ⚡️ and so on"]


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_ragged_batches_equal_single_runs(pipeline, guidance):
    options = dict(height=48, width=80, steps=4, guidance=guidance, negative_prompt="blurry",
                   output="latent")
    batch = sampler.generate(pipeline, PROMPTS, seed=7, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = sampler.generate(pipeline, prompt, seed=7 + i, **options)
        assert relative_error(batch[i:i + 1], alone) < 1e-5


def test_same_seed_same_image(pipeline):
    a, b, c = (sampler.generate(pipeline, "a cat", 32, 32, steps=2, seed=seed, output="tensor")
               for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_given_times_replace_steps_and_shift(pipeline):
    options = dict(height=32, width=32, output="latent")
    a = sampler.generate(pipeline, "a cat", steps=3, shift=2.0, **options)
    times = sampler.time_schedule(3, 2.0)
    assert torch.equal(sampler.generate(pipeline, "a cat", times=times, **options), a)


def test_only_ragged_batches_are_masked(pipeline):
    def mask(prompts):
        text = sampler.encode_prompts(pipeline, prompts)
        return pipeline.dit.prepare(text, 8, 8).mask

    assert mask(["a cat"] * 2) is None
    assert mask(["a cat", "a dog"]) is None                      # both within 32 tokens
    ragged = mask(PROMPTS[2:])
    assert ragged.shape == (2, 1, 1, 32 + 96)
    assert ragged[0].sum() == 32 + 32
    assert ragged[1].all()


@torch.no_grad()
def test_features_beyond_the_length_do_not_matter(pipeline):
    """A single item may be padded further than it needs, with anything."""
    features = torch.randn(1, 19, 32)
    padded = torch.cat((features, torch.full((1, 80, 32), 7.0)), 1)
    x, t, lengths = torch.randn(1, 16, 4, 6), torch.tensor([0.3]), torch.tensor([19])
    expected = pipeline.dit(x, t, Text(features, lengths))
    assert relative_error(pipeline.dit(x, t, Text(padded, lengths)), expected) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_networks_compile_to_one_graph(pipeline):
    """fullgraph=True raises at any graph break."""
    def check(function, *arguments):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        result, expected = compiled(*arguments), function(*arguments)
        if isinstance(result, Text):
            result, expected = result.features, expected.features
        assert relative_error(result, expected) < 1e-5

    ids, lengths = torch.randint(0, 500, (2, 40)), torch.tensor([40, 11])
    check(pipeline.text_encoder, ids, lengths)
    x, t = torch.randn(2, 16, 6, 8), torch.tensor([0.2, 0.7])
    text = pipeline.text_encoder(ids, lengths)
    check(pipeline.dit, x, t, text)
    check(pipeline.dit, x, t, pipeline.dit.prepare(text, 6, 8))
    check(pipeline.vae.decode, x)
    check(pipeline.vae.encode, torch.randn(1, 3, 32, 48))


@pytest.mark.slow
def test_a_compiled_dit_samples_the_same(pipeline):
    options = dict(height=32, width=48, steps=2, guidance=1.0, output="latent")
    expected = sampler.generate(pipeline, PROMPTS[:2], **options)
    compiled = sampler.load_pipeline(TINY)
    torch._dynamo.reset()
    compiled.dit.compile(fullgraph=True, backend="aot_eager")    # --compile without a C++ compiler
    assert relative_error(sampler.generate(compiled, PROMPTS[:2], **options), expected) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_captions_of_all_lengths_share_two_compilations():
    """One for the first length, one for any length; then nothing is compiled again."""
    from torch._dynamo.testing import CompileCounterWithBackend  # its import takes seconds
    dit = sampler.load_pipeline(TINY).dit
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    dit.compile(fullgraph=True, backend=counter)
    compilations, x = [], torch.randn(1, 16, 8, 8)
    for length in (10, 30, 40, 70, 100, 130, 20):
        features = torch.randn(1, length, dit.config.cap_feat_dim)
        context = dit.prepare(Text(features, torch.tensor([length])), 8, 8)
        dit(x, torch.tensor([0.5]), context)
        compilations.append(counter.frame_count)
    assert compilations == [1, 1, 2, 2, 2, 2, 2]


def test_gradients_reach_every_parameter(pipeline):
    """The networks train as they are: no parameter is cut off."""
    text = sampler.encode_prompts(pipeline, PROMPTS[:2])
    x = torch.randn(2, 16, 6, 6)                                 # 9 tokens, so pad tokens are used
    loss = pipeline.dit(x, torch.tensor([0.1, 0.8]), text).square().sum()
    for gradient in torch.autograd.grad(loss, list(pipeline.dit.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("prompts, options, words", [
    ("a cat", {"negative_prompt": ["red"], "guidance": 1.0}, "should be a string"),
    ([3], {}, "should be a string"),
    ([], {}, "no prompt"),
    ("a cat", {"output": "np"}, "pil, tensor or latent"),
    ("a cat", {"guidance_every": 0}, "guidance_every"),
    ("a cat", {"noise": torch.zeros(1, 16, 8, 8)}, "noise"),
    (["a cat", "a dog"], {"noise": torch.zeros(3, 16, 4, 4)}, "noise")])
def test_arguments_that_make_no_sense(pipeline, prompts, options, words):
    with pytest.raises(UserError, match=words):
        sampler.generate(pipeline, prompts, 32, 32, steps=1, **options)


# --- Image to image -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, strength, left", [
    (10, 0.9, 9), (10, 1.0, 10), (4, 0.5, 2), (8, 0.6, 5), (3, 0.34, 2), (5, 0.2, 1)])
def test_strength_cuts_the_first_steps(pipeline, steps, strength, left):
    """As many steps are left as in the official pipeline."""
    calls = Recorder(lambda i, x: None)
    sampler.image_to_image(pipeline, "a cat", Image.new("RGB", (32, 32)), strength, 32, 32, steps,
                           callback=calls)
    assert len(calls.calls) == left


def test_strength_that_leaves_no_step(pipeline):
    with pytest.raises(UserError, match="strength"):
        sampler.image_to_image(pipeline, "a cat", Image.new("RGB", (32, 32)), 1e-20, 32, 32, 2)


@torch.no_grad()
def test_image_to_image_starts_from_the_noised_image(pipeline, monkeypatch):
    """One exact step from there gives the image's own latents, sampled with the first draw."""
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    vae_noise, _ = sampler.latent_noise(pipeline, 32, 48, 5, 2)
    latents = pipeline.vae.encode(image, vae_noise)
    net = PointNet(latents)
    monkeypatch.setattr(pipeline.dit, "forward", net)
    x = sampler.image_to_image(pipeline, ["a cat", "a dog"], image, 0.3, 32, 48, 4, seed=5,
                               output="latent")
    assert relative_error(x, latents) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (3, 3, 32, 48), (1, 1, 32, 48), (3, 32, 48)])
def test_a_tensor_of_another_size_is_no_image_to_start_from(pipeline, shape):
    with pytest.raises(UserError, match="should have the shape"):
        sampler.image_to_image(pipeline, ["a cat", "a dog"], torch.zeros(shape), 0.5, 32, 48, 2)


@pytest.mark.parametrize("prompts, noise, problem", [
    ([], None, "no prompt"),
    (["a cat", "a dog"], torch.zeros(1, 4, 8, 12), "noise should have the shape"),
    (["a cat"], torch.zeros(1, 4, 12, 8), "noise should have the shape")])
def test_image_to_image_checks_the_request_as_generate_does(pipeline, prompts, noise, problem):
    """Noise of another shape is not stretched to the images."""
    image = torch.zeros(1, 3, 32, 48)
    with pytest.raises(UserError, match=problem):
        sampler.image_to_image(pipeline, prompts, image, 0.5, 32, 48, 2, noise=noise)


def test_a_context_is_for_latents_of_one_size(pipeline):
    """Another shape with as many tokens would give wrong positions, and no error."""
    text = sampler.encode_prompts(pipeline, ["a cat"])
    context = pipeline.dit.prepare(text, 4, 8)
    x, t = torch.randn(1, pipeline.dit.config.in_channels, 8, 4), torch.tensor([0.5])
    with pytest.raises(AssertionError, match="another size"):
        pipeline.dit(x, t, context)


# --- Prompts and broken numbers -------------------------------------------------------------------


def test_long_prompts_are_cut_with_a_warning_that_says_where(pipeline):
    words = " ".join(f"w{i}" for i in range(600))
    with pytest.warns(UserWarning, match="cut to its first 512 tokens") as caught:
        text = sampler.encode_prompts(pipeline, [words])
    assert text.lengths.tolist() == [512]
    quoted = str(caught[0].message).split("'")[1]
    assert len(quoted) == 40
    assert quoted in words
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.encode_prompts(pipeline, ["word"])


def test_a_very_long_prompt_costs_no_more_than_its_beginning(pipeline):
    """The bundled tokenizer takes minutes for a megabyte, and cannot be interrupted meanwhile."""
    words = "w " * sampler.MAX_CHARACTERS
    lengths = []

    class Tokenizer:
        def encode(self, text, **options):
            lengths.append(len(text))
            return pipeline.tokenizer.encode(text, **options)

    with pytest.warns(UserWarning, match="cut to its first 512 tokens"):
        ids = sampler.token_ids(Tokenizer(), words)
    assert lengths[0] < sampler.MAX_CHARACTERS + 100
    with pytest.warns(UserWarning):
        assert ids == sampler.token_ids(pipeline.tokenizer, words[:10000])


def test_latents_that_are_not_finite_are_refused(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.dit, "forward", lambda x, t, text: x / 0)
    with pytest.raises(UserError, match="not finite"):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)


def test_images_that_are_not_finite_are_refused(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "decode", lambda x: torch.full((1, 3, 32, 32), math.inf))
    with pytest.raises(UserError, match="not finite"):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)


def test_a_student_warns_of_other_steps(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "trained_steps", 4)
    with pytest.warns(UserWarning, match="distilled for 4 steps, not for"):
        sampler.recommended_times(pipeline, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.recommended_times(pipeline, 4)
        monkeypatch.setattr(pipeline, "trained_steps", [4, 1, 8])
        sampler.recommended_times(pipeline, 3)         # between those that it was made for
    with pytest.warns(UserWarning, match="distilled for"):
        sampler.recommended_times(pipeline, 9)


def test_errors_pass_through(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.dit, "forward", Failing(KeyError()))
    with pytest.raises(KeyError):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)


def test_rotary_frequencies_stay_float32():
    encoder = sampler.load_pipeline(TINY, dtype=torch.bfloat16).text_encoder
    cos, sin = encoder.rope(torch.tensor([1]))
    angles = torch.atan2(sin, cos).flatten()
    exact = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert relative_error(angles, exact) < 1e-6


def test_log_variance_is_clamped(pipeline, monkeypatch):
    huge = torch.full((1, 32, 2, 2), 1000.0)
    monkeypatch.setattr(pipeline.vae.encoder, "forward", lambda image: huge)
    assert pipeline.vae.moments(None)[1].unique().tolist() == [20]
