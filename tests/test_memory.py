"""Ways to need less memory or time: equal results by tiles, streamed blocks, float8 weights, and kernels picked for CPUs."""

import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refused, relative_error, run_here

import convert_weights
import model
import sampler
from convert_weights import UserError
from model import VAE, GroupNorm, Linear, VAEConfig, attend, quantise

PROMPTS = ["a cat", "two dogs in the snow at dusk"]


# --- The VAE in tiles ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    """As deep as the release's, and as crooked: random norms, so that every statistic matters."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 16), norm_num_groups=4)).eval()
    for norm in (m for m in vae.modules() if isinstance(m, GroupNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.3), torch.nn.init.normal_(norm.bias, 0, 0.3)
    return vae.requires_grad_(False)


def passes(layers):
    """As many passes as there are norms make tiling exact: each pass settles the statistics of one more."""
    return sum(isinstance(m, GroupNorm) for m in layers.modules()) + 1


@pytest.mark.parametrize("way, h, w", [("decode", 20, 9), ("encode", 9, 20)])
def test_tiles_are_exact_in_the_limit(vae, monkeypatch, way, h, w):
    """No seams: neighbours at a tile's edges, statistics and odd remainders are all accounted for."""
    x = torch.randn(2, 4, h, w) if way == "decode" else torch.rand(2, 3, 8 * h, 8 * w) * 2 - 1          # two tiles, one of them a remainder
    x = x + torch.linspace(-1, 1, x.shape[-1])                                 # tiles differ
    whole = getattr(vae, way)(x)
    monkeypatch.setattr(model, "PASSES", passes(getattr(vae, f"{way}r")))
    assert relative_error(getattr(vae, way)(x, tile=12), whole) < 1e-5
    monkeypatch.setattr(model, "PASSES", 1)                                     # statistics of each tile alone would not do
    assert relative_error(getattr(vae, way)(x, tile=12), whole) > 0.02
    assert all(m.tiles is None and m.shared is None for m in vae.modules() if isinstance(m, GroupNorm))


def test_there_is_no_seam(vae, monkeypatch):
    """What two passes leave is the same on both sides of a tile's edge: no step there. One pass alone makes steps."""
    z = torch.randn(1, 4, 16, 32) + torch.linspace(-2, 2, 32)
    whole, edge = vae.decode(z), torch.arange(8, 32, 8) * 8
    def step(passes):
        monkeypatch.setattr(model, "PASSES", passes)
        steps = (vae.decode(z, tile=8) - whole).diff(dim=-1).abs().mean((0, 1, 2))   # between a column and the next
        return float(steps[edge - 1].mean() / steps.mean())
    assert step(2) < 1.4 and step(1) > 1.6


def test_one_tile_is_the_whole(vae):
    z = torch.randn(1, 4, 8, 8)
    assert relative_error(vae.decode(z, tile=8), vae.decode(z)) < 1e-5


def test_tiles_bound_memory(vae):
    """The largest tensor any level sees does not grow with the image."""
    def largest(side):
        seen = []
        hooks = [m.register_forward_hook(lambda _, args, out: seen.append(out.numel())) for m in vae.decoder.levels.modules()]
        vae.decode(torch.randn(1, 4, side, side), tile=8)
        for hook in hooks:
            hook.remove()
        return max(seen)
    assert largest(24) == largest(32)


def test_a_tile_that_fails_leaves_the_norms_as_they_were(vae):
    with mock.patch.object(vae.decoder.conv_out, "forward", side_effect=KeyError), pytest.raises(KeyError):
        vae.decode(torch.randn(1, 4, 16, 16), tile=8)
    assert all(m.tiles is None and m.shared is None for m in vae.modules() if isinstance(m, GroupNorm))


@pytest.mark.parametrize("offload, tile, size, tiled", [
    (None, None, (32, 48), False), (None, True, (32, 48), True), ("blocks", None, (32, 48), True), ("blocks", False, (32, 48), False),
    (None, None, (2000, 1024), True), (None, False, (2000, 1024), False)])
def test_when_generate_tiles(monkeypatch, offload, tile, size, tiled):
    pipeline = sampler.load_pipeline(TINY)
    pipeline.offload, pipeline.tile = offload, tile
    pipeline.dit.config.axes_lens, seen = (1536, 512, 512), []
    monkeypatch.setattr(sampler, "sample", lambda dit, x, *_: x)
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, tile: seen.append(tile) or torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(pipeline.vae, "encode", lambda image, noise, tile: seen.append(tile) or torch.zeros(1, 16, 1, 1))
    sampler.generate(pipeline, "a cat", *size, init_image=torch.zeros(1, 3, 8, 8), output="tensor")
    assert seen == [sampler.TILE if tiled else None] * 2


# --- Blocks streamed from host memory -----------------------------------------------------------------------


def watch_copies(monkeypatch):
    """-> log of (blocks on the device, this block) at each loan; every copy counts as on the device for as long as it lives."""
    log, copies, copy, lend = [], [], sampler.BlockStream.copy, sampler.BlockStream.lend

    def copying(self, i):
        copy(self, i)
        copies.append((id(self), i, [weakref.ref(t) for t in self.here[i]]))

    def lending(self, i):
        lend(self, i)
        assert all(t.data_ptr() == w.data_ptr() != h.data_ptr() for t, w, h in zip(self.tensors[i], self.here[i], self.host[i]))
        log.append(({(stream, block) for stream, block, tensors in copies if any(t() is not None for t in tensors)}, (id(self), i)))
    monkeypatch.setattr(sampler.BlockStream, "copy", copying)
    monkeypatch.setattr(sampler.BlockStream, "lend", lending)
    return log


@pytest.mark.parametrize("weights", [None, "fp8"])
def test_streamed_blocks(monkeypatch, weights):
    """Same pictures; never more than two blocks on the device, the next one there before it is needed."""
    options = dict(prompts=PROMPTS, height=32, width=48, steps=2, guidance=2.0, output="tensor")
    expected = sampler.generate(sampler.load_pipeline(TINY, weights=weights), **options)
    log = watch_copies(monkeypatch)
    streamed = sampler.load_pipeline(TINY, offload="blocks", weights=weights)
    streamed.tile = False
    host = {name: t.data_ptr() for net in (streamed.text_encoder, streamed.dit) for name, t in net.state_dict().items()}
    for _ in range(2):
        assert torch.equal(sampler.generate(streamed, **options), expected)
    assert host == {name: t.data_ptr() for net in (streamed.text_encoder, streamed.dit) for name, t in net.state_dict().items()}
    blocks = len([*streamed.dit.noise_refiner, *streamed.dit.layers])
    assert len(log) == 2 * (2 * len(streamed.text_encoder.layers) + 2 * len(streamed.dit.context_refiner) + 4 * blocks)
    assert all(now in there and len(there) <= 2 for there, now in log)


def test_a_streamed_block_that_fails_gives_its_weights_back():
    pipeline = sampler.load_pipeline(TINY, offload="blocks")
    pipeline.tile = False
    host = [t.data_ptr() for t in pipeline.dit.parameters()]
    with mock.patch.object(model.SwiGLU, "forward", side_effect=KeyError), pytest.raises(KeyError):
        sampler.generate(pipeline, "a cat", 32, 32, steps=1)
    assert host == [t.data_ptr() for t in pipeline.dit.parameters()]
    assert torch.equal(sampler.generate(pipeline, "a cat", 32, 32, steps=1, output="tensor"),
                       sampler.generate(sampler.load_pipeline(TINY), "a cat", 32, 32, steps=1, output="tensor"))


def test_what_stays_on_the_device(monkeypatch):
    """With the device by another name: all but blocks and word embeddings moves there at once, the VAE while it works."""
    pipeline, moved = sampler.load_pipeline(TINY), []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: moved.append(self.data_ptr()) or to(self, *args, **kwargs))
    sampler.stream_blocks(pipeline)
    staying = {t.data_ptr() for part in (*pipeline.text_encoder.layers, *pipeline.dit.context_refiner, *pipeline.dit.noise_refiner, *pipeline.dit.layers,
                                         pipeline.text_encoder.embed_tokens) for t in part.parameters()}
    everything = {t.data_ptr() for net in (pipeline.text_encoder, pipeline.dit) for t in net.parameters()}
    assert set(moved) == everything - staying


# --- float8 weights -----------------------------------------------------------------------------------------


def test_quantise():
    """Within half a step of a number with three bits after the point, rows that differ by a million included."""
    weight = torch.randn(64, 256, dtype=torch.float64) * torch.logspace(-3, 3, 64)[:, None]
    small, scale = quantise(weight)
    assert small.dtype == torch.float8_e4m3fn and scale.shape == (64, 1)
    back, size = small.double() * scale, weight.abs().amax(1, keepdim=True)
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, size * 2**-10 / 448) * 1.001).all()
    assert torch.equal(quantise(torch.zeros(2, 4))[0].float(), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_float8_product(dtype, limit):
    """The product with the weights as rounded, in both ways of computing it; the second rounds activations, too."""
    layer, x = Linear(64, 48), torch.randn(2, 5, 64)
    layer.to_float8()
    exact = x.double() @ (layer.weight.double() * layer.scale).t()
    assert relative_error(layer(x.to(dtype)), exact) < limit
    with mock.patch.object(model, "has_float8_products", lambda device: True):
        rows, scale = quantise(x.flatten(0, 1))
        exact = (rows.double() * scale).view_as(x) @ (layer.weight.double() * layer.scale).t()
        y = layer(x.to(dtype))
        assert y.shape == (2, 5, 48) and y.dtype == dtype and relative_error(y, exact) < (limit if dtype == torch.float32 else 2e-2)
        odd = Linear(60, 44)                                                    # not for the kernel, which wants multiples of 16
        odd.to_float8()
        assert relative_error(odd(x[..., :60]), x[..., :60].double() @ (odd.weight.double() * odd.scale).t()) < 1e-6


def test_float8_checkpoint():
    """Blocks in float8 as `quantise` has it, whatever the layout stacks; everything else as before."""
    plain, small = (sampler.load_pipeline(TINY, weights=weights).dit for weights in (None, "fp8"))
    layers = {f"{name}.weight" for name, m in small.named_modules() if isinstance(m, Linear)}
    assert len(layers) == 4 * len([*small.layers, *small.noise_refiner, *small.context_refiner])
    ours = small.state_dict()
    for name, weight in plain.state_dict().items():
        expected = quantise(weight)[0] if name in layers else weight
        assert ours[name].dtype == expected.dtype and torch.equal(ours[name].float(), expected.float()), name
    x, t, text = torch.randn(1, 16, 8, 8), torch.tensor([0.4]), model.Text(torch.randn(1, 9, small.config.cap_feat_dim), torch.tensor([9]))
    with torch.no_grad():
        assert 1e-4 < relative_error(small(x, t, text), plain(x, t, text)) < 0.1
    with pytest.raises(UserError, match="fp8"):
        sampler.load_pipeline(TINY, weights="fp4")


# --- Kernels for CPUs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 40, 16), (1, 4, 1200, 8)])            # heads at once; one after the other
def test_attention_spelt_out(shape, masked, monkeypatch):
    monkeypatch.setattr(model, "has_bfloat16_products", lambda: True)
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    mask = (torch.rand(shape[0], 1, 1, shape[2]) > 0.3) if masked else None
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", side_effect=KeyError):
        assert relative_error(attend(q, k, v, mask), exact) < 1e-2
    assert relative_error(attend(q, k, v, mask), exact) < 1e-2                  # with gradients on: PyTorch's own


def test_linear_by_onednn_and_without():
    layer, x = Linear(64, 48), torch.randn(2, 5, 64)
    expected = (x.double() @ layer.weight.double().t()).detach()
    with torch.no_grad():
        with mock.patch.object(F, "linear", side_effect=KeyError):
            assert relative_error(layer(x), expected) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert relative_error(layer(x).detach(), expected.detach()) < 1e-6 and layer(x).requires_grad


def test_bfloat16_where_its_products_are_slow(monkeypatch):
    """Multiplied in float32, and rounded once; attention by PyTorch's kernel, which does so, too."""
    monkeypatch.setattr(model, "has_bfloat16_products", lambda: False)
    layer, x = Linear(64, 48).bfloat16(), torch.randn(2, 5, 64).bfloat16()
    bare, linear = F.linear, mock.Mock(side_effect=lambda x, w: bare(x, w))
    with torch.no_grad(), mock.patch.object(F, "linear", linear):
        exact = (x.double() @ layer.weight.double().t()).float().bfloat16()
        assert layer(x).dtype == torch.bfloat16 and (layer(x) != exact).float().mean() < 0.01
    assert all(call.args[0].dtype == torch.float32 for call in linear.call_args_list)
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention") as fused:
        attend(*(x[:, None] for _ in range(3)))
    assert fused.called


def test_freed_memory_is_kept_where_glibc_is():
    with mock.patch("ctypes.CDLL") as library:
        sampler.keep_freed_memory()
    assert {call.args[0] for call in library().mallopt.call_args_list} == {-1, -3}      # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    for error in (OSError, TypeError, AttributeError):                          # no such library, Windows, another C library
        with mock.patch("ctypes.CDLL", side_effect=error):
            sampler.keep_freed_memory()


# --- The command line ---------------------------------------------------------------------------------------


def test_options_reach_the_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded, load = [], sampler.load_pipeline
    monkeypatch.setattr(sampler, "load_pipeline", lambda *args: loaded.append((args[3:], load(*args))) or loaded[-1][1])
    for options, expected, tile in [
            ([], (None, None), None), (["--offload"], ("networks", None), None), (["--offload", "blocks", "--tile"], ("blocks", None), True),
            (["--weights", "fp8", "--no-tile", "--attention", "math"], (None, "fp8"), False)]:
        assert run_here(sampler.main, *options, "a cat", "--model", str(TINY), "--size", "32x32", "--steps", "1").returncode == 0
        assert loaded[-1][0] == expected and loaded[-1][1].tile is tile
    assert loaded[-1][1].attention == "math"
    assert len(list(tmp_path.glob("image*.png"))) == 4
    assert refused(run_here(sampler.main, "a cat", "--compile", "--offload", "blocks"), "--compile", "--offload blocks")
    assert refused(run_here(sampler.main, "a cat", "--model", str(TINY), "--size", "32x32", "--attention", "cudnn"), "leave out --attention")


def test_prompts_and_options_may_alternate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here(sampler.main, "--offload", "a cat", "--model", str(TINY), "--size", "32x32", "--steps", "1", "a dog").returncode == 0
    assert len(list(tmp_path.glob("image*.png"))) == 2
    assert run_here(convert_weights.main, str(TINY), "--dtype", "bfloat16", "converted").returncode == 0
    assert (tmp_path / "converted" / "dit.safetensors").exists()
