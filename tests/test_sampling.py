"""The mathematics of sampling, on nets with known answers, and what the sampler promises about seeds, batches and cost."""

import warnings

import pytest
import torch
from conftest import TINY, relative_error

import sampler
from convert_weights import UserError
from model import Context, Text, patchify, unpatchify


def linear_net(data):
    """The exact velocity of a data distribution that is one point: x_t = t data + (1 - t) noise, so v = (data - x) / (1 - t)."""
    return lambda x, t, text: (data - x) / (1 - t).view(-1, *[1] * (x.ndim - 1))


# --- Conventions --------------------------------------------------------------------------------------------


def test_data_and_noise_estimates_on_the_linear_path():
    data, noise = torch.randn(2, 3, 16, dtype=torch.float64).unbind()
    for t in torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64):
        x = t * data + (1 - t) * noise
        v = linear_net(data)(x, t.expand(3), None)
        torch.testing.assert_close(v, data - noise)
        torch.testing.assert_close(x + (1 - t) * v, data)
        torch.testing.assert_close(x - t * v, noise)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_euler_is_exact_on_the_linear_path(steps):
    data, noise = torch.randn(2, 3, 4, 2, 2).unbind()
    x = sampler.sample(linear_net(data), noise, None, sampler.time_schedule(steps, 3.0))
    assert relative_error(x, data) < 1e-5


def test_sample_on_plain_points():
    """Any callable is a net and any shape a batch: an MLP on 2-D points, say."""
    x = sampler.sample(lambda x, t, text: text * torch.ones_like(x), torch.zeros(5, 2), 3.0, sampler.time_schedule(4, 1.0))
    torch.testing.assert_close(x, torch.full((5, 2), 3.0))


def test_time_schedule_by_hand():
    # sigma = 3u / (1 + 2u) for u = 1, 7/8, ..., 1/8, then 0; t = 1 - sigma
    by_hand = [0, 1 / 22, 1 / 10, 1 / 6, 1 / 4, 5 / 14, 1 / 2, 7 / 10, 1]
    torch.testing.assert_close(sampler.time_schedule(8, 3.0), torch.tensor(by_hand), atol=1e-7, rtol=0)
    assert sampler.time_schedule(1, 3.0).tolist() == [0, 1]
    torch.testing.assert_close(sampler.time_schedule(5, 1.0), torch.linspace(0, 1, 6))
    for steps in (1, 2, 8, 50, 1000):
        times = sampler.time_schedule(steps, 6.0)
        assert len(times) == steps + 1 and times.dtype == torch.float32 and (times.diff() > 0).all()
        assert times[0] == 0 and times[-1] == 1


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (8, 0.0), (8, -1.0), (8, float("nan")), (8, float("inf")), (8, 1e300)])
def test_bad_schedules(steps, shift):
    with pytest.raises(UserError):
        sampler.time_schedule(steps, shift)


def test_patchify():
    """A token is its 2x2 patch in the order row, column, channel; unpatchify takes it back."""
    x = torch.randn(2, 16, 6, 4)
    tokens = patchify(x)
    assert tokens.shape == (2, 6, 64)
    torch.testing.assert_close(tokens[1, 3], x[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())   # second row of patches, second column
    assert torch.equal(unpatchify(tokens, 6, 4), x)


# --- Guidance -----------------------------------------------------------------------------------------------


def test_guidance():
    net = lambda x, t, text: torch.full_like(x, text)
    x, t = torch.zeros(2, 4), torch.zeros(2)
    torch.testing.assert_close(sampler.guided_velocity(net, x, t, 2.0, 1.0, 3.0), torch.full((2, 4), 5.0))   # 2 + 3 (2 - 1)
    clipped = sampler.guided_velocity(net, x, t, 2.0, 1.0, 3.0, cfg_normalization=True)
    torch.testing.assert_close(clipped, torch.full((2, 4), 2.0))                                             # as long as v again
    torch.testing.assert_close(sampler.guided_velocity(net, x, t, 2.0, 1.0, 3.0, 1.5), torch.full((2, 4), 3.0))
    shorter = sampler.guided_velocity(net, x, t, 2.0, 3.0, 1.0, cfg_normalization=True)
    torch.testing.assert_close(shorter, torch.full((2, 4), 1.0))                                             # never lengthened
    assert not sampler.guided_velocity(net, x, t, 0.0, 0.0, 3.0, True).any()                                 # nor divided by zero


def test_truncation_and_cost():
    """Guidance doubles the calls while t <= cfg_truncation only; guidance 0 never calls the negative, nor encodes it."""
    calls = []

    def net(x, t, text):
        calls.append((text, len(x)))
        return torch.zeros_like(x)
    times, noise = sampler.time_schedule(8, 3.0), torch.zeros(3, 2)
    sampler.sample(net, noise, "+", times)
    assert calls == [("+", 3)] * 8
    calls.clear()
    sampler.sample(net, noise, "+", times, guidance=2.0, negative="-", cfg_truncation=0.3)
    assert calls == [("+", 3), ("-", 3)] * 5 + [("+", 3)] * 3
    with pytest.raises(ValueError):
        sampler.sample(net, noise, "+", times, guidance=2.0)


def test_guidance_zero_encodes_one_text_and_prepares_once(pipeline, monkeypatch):
    encoded, prepared, steps = [], [], []
    encode, prepare, forward = sampler.encode_prompts, pipeline.dit.prepare, pipeline.dit.forward
    monkeypatch.setattr(sampler, "encode_prompts", lambda p, prompts: encoded.append(list(prompts)) or encode(p, prompts))
    monkeypatch.setattr(pipeline.dit, "prepare", lambda *a: prepared.append(a) or prepare(*a))
    monkeypatch.setattr(pipeline.dit, "forward", lambda x, t, text: steps.append((len(x), text)) or forward(x, t, text))
    sampler.generate(pipeline, ["a cat"] * 3, 32, 32, steps=4)
    assert encoded == [["a cat"]] and len(prepared) == 1                     # one prompt, encoded once for three images
    assert [n for n, _ in steps] == [3] * 4 and all(isinstance(text, Context) and text.mask is None for _, text in steps)
    sampler.generate(pipeline, ["a cat"], 32, 32, steps=4, guidance=1.0, negative_prompt="dog")
    assert encoded[1:] == [["a cat"], ["dog"]] and len(prepared) == 3 and len(steps) == 4 + 8


# --- Batches, seeds, masks ----------------------------------------------------------------------------------

PROMPTS = ["a cat", "Neon sign reading “造相 Z-Image” at night, rain, 西安大雁塔 in the distance ⚡️", "", "a dog on a red sofa"]


def test_ragged_batches_equal_single_runs(pipeline):
    for guidance in (0.0, 3.0):
        options = dict(height=48, width=80, steps=4, guidance=guidance, negative_prompt="blurry", output="latent")
        batch = sampler.generate(pipeline, PROMPTS, seed=7, **options)
        for i, prompt in enumerate(PROMPTS):
            assert relative_error(batch[i:i + 1], sampler.generate(pipeline, prompt, seed=7 + i, **options)) < 1e-5


def test_same_seed_same_image(pipeline):
    a, b, c = (sampler.generate(pipeline, "a cat", 32, 32, steps=2, seed=s, output="tensor") for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_only_ragged_batches_are_masked(pipeline):
    prepare = pipeline.dit.prepare
    text = sampler.encode_prompts(pipeline, ["a cat"] * 2)
    assert prepare(text, 8, 8).mask is None
    assert prepare(sampler.encode_prompts(pipeline, ["a cat", "a dog"]), 8, 8).mask is None      # both within 32 tokens
    ragged = prepare(sampler.encode_prompts(pipeline, PROMPTS[:2]), 8, 8).mask
    assert ragged.shape == (2, 1, 1, 32 + 96) and ragged[0].sum() == 32 + 32 and ragged[1].all()


@torch.no_grad()
def test_features_beyond_the_length_do_not_matter(pipeline):
    """A single item may be padded further than it needs, with anything."""
    features = torch.randn(1, 19, 32)
    x, t = torch.randn(1, 16, 4, 6), torch.tensor([0.3])
    padded = torch.cat((features, torch.full((1, 80, 32), 7.0)), 1)
    assert relative_error(pipeline.dit(x, t, Text(padded, torch.tensor([19]))), pipeline.dit(x, t, Text(features, torch.tensor([19])))) < 1e-5


@torch.no_grad()
def test_networks_compile_to_one_graph(pipeline):
    """fullgraph=True raises at any graph break: none in the encoder, in the DiT with a Text or a Context, nor in the VAE."""
    def compiled(function, *arguments):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments), function(*arguments)
    ids, lengths = torch.randint(0, 500, (2, 40)), torch.tensor([40, 11])
    out, expected = compiled(pipeline.text_encoder, ids, lengths)
    assert relative_error(out.features, expected.features) < 1e-5
    x, t = torch.randn(2, 16, 6, 8), torch.tensor([0.2, 0.7])
    for text in (expected, pipeline.dit.prepare(expected, 6, 8)):
        assert relative_error(*compiled(pipeline.dit, x, t, text)) < 1e-5
    assert relative_error(*compiled(pipeline.vae.decode, x)) < 1e-5
    assert relative_error(*compiled(pipeline.vae.encode, torch.randn(1, 3, 32, 48))) < 1e-5


def test_a_compiled_dit_samples_the_same(pipeline):
    expected = sampler.generate(pipeline, PROMPTS[:2], 32, 48, steps=2, guidance=1.0, output="latent")
    compiled = sampler.load_pipeline(TINY)
    torch._dynamo.reset()
    compiled.dit.compile(fullgraph=True, backend="aot_eager")                # what --compile does, without a C++ compiler
    assert relative_error(sampler.generate(compiled, PROMPTS[:2], 32, 48, steps=2, guidance=1.0, output="latent"), expected) < 1e-5


def test_gradients_reach_every_parameter(pipeline):
    """The networks train as they are: no parameter is cut off."""
    dit = pipeline.dit
    text = sampler.encode_prompts(pipeline, PROMPTS[:2])
    parameters = dict(dit.named_parameters())
    x = torch.randn(2, 16, 6, 6)                                             # 9 tokens, so pad tokens are used
    grads = torch.autograd.grad(dit(x, torch.tensor([0.1, 0.8]), text).square().sum(), list(parameters.values()))
    assert all(g.isfinite().all() and g.any() for g in grads)


# --- Prompts ------------------------------------------------------------------------------------------------


def test_long_prompts_are_cut_with_a_warning(pipeline):
    with pytest.warns(UserWarning, match="tokens is cut to 512"):
        text = sampler.encode_prompts(pipeline, ["word " * 600])
    assert text.lengths.tolist() == [512]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.encode_prompts(pipeline, ["word"])


def test_float16_overflow_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.dit, "forward", lambda x, t, text: x / 0)
    with pytest.raises(UserError, match="not finite"):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)


@pytest.mark.parametrize("init_image", [None, torch.zeros(1, 3, 32, 32)])
def test_offload(pipeline, monkeypatch, init_image):
    """Each network is on the device while it works, alone, and the pictures are the same."""
    away = sampler.Pipeline(**{**vars(pipeline), "offload": "networks"})
    moves, names = [], {id(getattr(away, name)): name for name in ("text_encoder", "dit", "vae")}
    for name in names.values():
        network = getattr(away, name)
        monkeypatch.setattr(network, "to", lambda device, network=network: moves.append((names[id(network)], str(device))))
    away.device = torch.device("cpu", 0)                                     # by another name, to tell the two moves apart
    options = dict(prompts=PROMPTS[:2], height=32, width=32, steps=2, guidance=1.0, output="tensor", init_image=init_image)
    assert torch.equal(sampler.generate(away, **options), sampler.generate(pipeline, **options))
    order = ["vae"] * (init_image is not None) + ["text_encoder", "text_encoder", "dit", "vae"]
    assert moves == [(name, device) for name in order for device in ("cpu:0", "cpu")]
    monkeypatch.setattr(away.dit, "forward", lambda *_: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(KeyError):
        sampler.generate(away, **options)
    assert moves[-1] == ("dit", "cpu")                                       # back even if it fails


def test_load_pipeline_with_offload(monkeypatch):
    loaded = []
    for name in ("load_dit", "load_text_encoder", "load_vae"):
        monkeypatch.setattr(sampler, name, lambda path, device, dtype, *_: loaded.append((str(device), dtype)))
    assert sampler.load_pipeline(TINY, "cuda", torch.bfloat16, offload="networks").device == torch.device("cuda")
    assert loaded == [("cpu", torch.bfloat16), ("cpu", torch.bfloat16), ("cpu", torch.float32)]
    loaded.clear()
    assert not sampler.load_pipeline(TINY, "cuda", torch.bfloat16).offload
    assert [device for device, _ in loaded] == ["cuda"] * 3


def test_rotary_frequencies_stay_float32():
    encoder = sampler.load_pipeline(TINY, dtype=torch.bfloat16).text_encoder
    exact = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert encoder.frequencies().dtype == torch.float32 and relative_error(encoder.frequencies(), exact) < 1e-6


def test_log_variance_is_clamped(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae.encoder, "forward", lambda *_: torch.full((1, 32, 2, 2), 1000.0))
    assert pipeline.vae.moments(None)[1].unique().tolist() == [20]


def test_decoded_pictures_are_finite(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "decode", lambda *_: torch.full((1, 3, 32, 32), float("inf")))
    with pytest.raises(UserError, match="not finite"):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)
