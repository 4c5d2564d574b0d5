"""What is applied to built networks: tiles, offloading, one-byte weights, kernels for CPUs."""

import copy
import ctypes
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import convert_weights
import formats
import hardware
import sampler
from conftest import DATA, TINY, Failing, Recorder, relative_error
from convert_weights import NETWORKS, QUANTIZED, UserError
from formats import hadamard, quantize_rows, rotate, rotation_group
from model import VAE, Attention, VAEConfig, rotate_pairs

PROMPTS = ["a cat", "two dogs in the snow at dusk"]
CPU = torch.device("cpu")
TABLE = {"table": hardware.KEEP["table"]}


# --- The VAE in tiles -----------------------------------------------------------------------------


def group_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.GroupNorm)]


@pytest.fixture
def vae():
    """As deep as the release's, with random norms, so that every statistic matters."""
    torch.manual_seed(0)
    config = VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
    vae = VAE(config).eval()
    for norm in group_norms(vae):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return vae.requires_grad_(False)


def tiled(vae, tile, above=0):
    other = copy.deepcopy(vae)
    hardware.use_tiles(other, tile, above)
    return other


@pytest.mark.slow
@pytest.mark.parametrize("way, h, w", [("decode", 20, 9), ("encode", 9, 20)])
def test_tiles_are_exact_in_the_limit(vae, monkeypatch, way, h, w):
    """No seams: a tile's neighbors, statistics and odd remainders are all accounted for.

    As many passes as there are norms make tiling exact: each settles the statistics of one more.
    """
    shape = (2, 4, h, w) if way == "decode" else (2, 3, 8 * h, 8 * w)
    x = torch.randn(shape) + torch.linspace(-1, 1, shape[-1])    # the tiles differ
    whole = getattr(vae, way)(x)
    in_tiles = tiled(vae, 12)
    monkeypatch.setattr(hardware, "PASSES", len(group_norms(vae)) + 1)
    assert relative_error(getattr(in_tiles, way)(x), whole) < 1e-5
    monkeypatch.setattr(hardware, "PASSES", 1)                    # statistics of one tile do not do
    assert relative_error(getattr(in_tiles, way)(x), whole) > 0.02
    assert all("forward" not in vars(norm) for norm in group_norms(in_tiles))


def test_there_is_no_seam(vae, monkeypatch):
    """What two passes leave is the same on both sides of an edge. One pass alone makes steps."""
    z = torch.randn(1, 4, 16, 32) + torch.linspace(-2, 2, 32)
    whole, edge, in_tiles = vae.decode(z), torch.arange(8, 32, 8) * 8, tiled(vae, 8)

    def step(passes):
        monkeypatch.setattr(hardware, "PASSES", passes)
        steps = (in_tiles.decode(z) - whole).diff(dim=-1).abs().mean((0, 1, 2))
        return float(steps[edge - 1].mean() / steps.mean())      # at edges, beside the average

    assert step(2) < 1.4
    assert step(1) > 1.6


def test_one_tile_is_the_whole(vae):
    z = torch.randn(1, 4, 8, 8)
    assert relative_error(tiled(vae, 8).decode(z), vae.decode(z)) < 1e-5


@pytest.mark.parametrize("above, is_tiled", [(64 * 64, False), (64 * 64 - 1, True)])
def test_small_images_are_not_tiled(vae, monkeypatch, above, is_tiled):
    calls = Recorder(hardware.in_tiles)
    monkeypatch.setattr(hardware, "in_tiles", calls)
    in_tiles = tiled(vae, 4, above)
    latents = in_tiles.encode(torch.rand(1, 3, 64, 64))
    in_tiles.decode(latents)
    assert len(calls.calls) == 2 * is_tiled


def test_tiles_bound_memory(vae):
    """The largest tensor that any level sees does not grow with the image."""
    in_tiles, sizes = tiled(vae, 8), []
    for module in in_tiles.decoder.up_blocks.modules():
        module.register_forward_hook(lambda module, x, out: sizes.append(out.numel()))

    def largest(side):
        sizes.clear()
        in_tiles.decode(torch.randn(1, 4, side, side))
        return max(sizes)

    assert largest(24) == largest(32)


def test_a_tile_that_fails_leaves_the_norms_as_they_were(vae, monkeypatch):
    in_tiles = tiled(vae, 8)
    monkeypatch.setattr(in_tiles.decoder.conv_out, "forward", Failing(KeyError()))
    with pytest.raises(KeyError):
        in_tiles.decode(torch.randn(1, 4, 16, 16))
    assert all("forward" not in vars(norm) for norm in group_norms(in_tiles))


# --- Turns on the device, streamed blocks ---------------------------------------------------------
#
# What is loaded is a copy, on a CPU too, so that a CPU can stand for the device.

OPTIONS = dict(prompts=PROMPTS, height=32, width=48, steps=2, guidance=2.0, output="tensor")


class Places:
    """Remembers where the tensors of modules lie -> the names of modules that lie elsewhere."""

    def __init__(self, modules):
        self.home = {name: [(t, t.data_ptr()) for t in hardware.tensors_of(module)]
                     for name, module in modules.items()}

    def loaded(self):
        return {name for name, tensors in self.home.items()
                if any(tensor.data_ptr() != place for tensor, place in tensors)}

    def wholly_loaded(self):
        return {name for name, tensors in self.home.items()
                if all(tensor.data_ptr() != place for tensor, place in tensors)}


@pytest.mark.parametrize("is_tiled", [False, True])
def test_networks_take_turns(pipeline, is_tiled):
    """The network that computes is loaded, alone and whole, and the pictures are the same."""
    turns = sampler.load_pipeline(TINY)
    if is_tiled:
        hardware.use_tiles(turns.vae, 4, 0)
    expected = sampler.generate(turns, **OPTIONS)
    networks = {"text_encoder": turns.text_encoder, "dit": turns.dit, "vae": turns.vae}
    places, order = Places(networks), []
    hardware.TakeTurns(networks.values(), CPU)
    for name, network in networks.items():
        for module in network.modules():
            if not [*module.children()]:
                module.register_forward_pre_hook(
                    lambda module, x, name=name: order.append((name, places.loaded())))
    for _ in range(2):
        assert torch.equal(sampler.generate(turns, **OPTIONS), expected)
    assert all(loaded == {name} for name, loaded in order)
    assert {name for name, _ in order} == set(networks)
    assert places.wholly_loaded() == {"vae"}


def test_a_network_that_fails_in_its_turn(pipeline, monkeypatch):
    turns = sampler.load_pipeline(TINY)
    expected = sampler.generate(turns, **OPTIONS)
    hardware.TakeTurns([turns.text_encoder, turns.dit, turns.vae], CPU)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(turns.dit.final_layer, "forward", Failing(KeyError()))
        sampler.generate(turns, **OPTIONS)
    assert torch.equal(sampler.generate(turns, **OPTIONS), expected)


def streamed_pipeline(weights=None):
    pipeline = sampler.load_pipeline(TINY)
    if weights:
        hardware.quantize(pipeline.dit, weights)
    return pipeline


@pytest.mark.parametrize("weights", [None, "fp8", "int8"])
def test_streamed_blocks(weights):
    """Same pictures; the block that computes is loaded, and at most one more of its stack."""
    pipeline = streamed_pipeline(weights)
    expected = sampler.generate(pipeline, **OPTIONS)
    encoder, dit = pipeline.text_encoder, pipeline.dit
    stacks = [[*encoder.layers], [*dit.context_refiner], [*dit.noise_refiner, *dit.layers]]
    blocks = {(i, j): block for i, stack in enumerate(stacks) for j, block in enumerate(stack)}
    places, calls = Places(blocks), []
    hardware.stream_blocks(pipeline)
    for key, block in blocks.items():
        block.register_forward_pre_hook(
            lambda module, x, key=key: calls.append((key, places.wholly_loaded())))
    for _ in range(2):
        assert torch.equal(sampler.generate(pipeline, **OPTIONS), expected)
        assert not places.loaded()                               # all weights are at home again
    assert all(loaded == {key} for key, loaded in calls)
    assert {key for key, _ in calls} == set(blocks)


def test_a_stream_holds_two_blocks_at_most():
    blocks = [nn.Linear(4, 4) for _ in range(5)]
    stream, counts = hardware.BlockStream(blocks, CPU), []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda module, x, i=i: counts.append((i in stream.loaded, len(stream.loaded))))
    x = torch.randn(2, 4)
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    assert all(is_loaded and count <= 2 for is_loaded, count in counts)
    assert not stream.loaded


def test_a_streamed_block_that_fails_gives_its_weights_back(monkeypatch):
    pipeline = streamed_pipeline()
    expected = sampler.generate(pipeline, **OPTIONS)
    places = Places({"dit": pipeline.dit})
    hardware.stream_blocks(pipeline)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(pipeline.dit.layers[1].feed_forward, "forward", Failing(KeyError()))
        sampler.generate(pipeline, **OPTIONS)
    assert not places.loaded()
    assert torch.equal(sampler.generate(pipeline, **OPTIONS), expected)


def test_what_stays_on_the_device(monkeypatch):
    """All but the blocks and the word embeddings moves to the device at once."""
    monkeypatch.setattr(hardware, "BlockStream", Recorder(lambda *arguments, **options: None))
    monkeypatch.setattr(hardware, "TakeTurns", Recorder(lambda *arguments: None))
    pipeline = streamed_pipeline()
    pipeline.device = torch.float64                              # a move that can be seen
    hardware.stream_blocks(pipeline)
    encoder, dit = pipeline.text_encoder, pipeline.dit
    on_host = hardware.tensors_of(*encoder.layers, *dit.context_refiner, *dit.noise_refiner,
                                 *dit.layers, encoder.embed_tokens)
    assert {tensor.dtype for tensor in on_host} == {torch.float32}
    moved = [tensor for tensor in hardware.tensors_of(dit) if tensor.dtype == torch.float64]
    assert len(moved) + len(on_host) == len(hardware.tensors_of(encoder, dit))


# --- One byte for each weight ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype, mantissa, smallest", [
    (torch.float8_e4m3fn, 1 / 16, 2 ** -10 / 448), (torch.int8, 0, 0.5 / 127)])
def test_quantize_rows(dtype, mantissa, smallest):
    """Within half a step, rows that differ by a million included."""
    weight = torch.randn(64, 256, dtype=torch.float64) * torch.logspace(-3, 3, 64)[:, None]
    rows, scale = quantize_rows(weight, dtype)
    assert rows.dtype == dtype
    assert (scale.shape, scale.dtype) == ((64, 1), torch.float32)
    error = (rows.double() * scale - weight).abs()
    size = weight.abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(weight.abs() * mantissa, size * smallest) * 1.001).all()
    assert not quantize_rows(torch.zeros(2, 4), dtype)[0].float().any()


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_hadamard(size):
    matrix = hadamard(size).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t())
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size ** -0.5))


def test_rotation_changes_no_product():
    x, weight = torch.randn(5, 128, dtype=torch.float64), torch.randn(7, 128, dtype=torch.float64)
    for group in (1, 4, 16, 64):
        matrix = hadamard(group)
        product = rotate(x, matrix) @ rotate(weight, matrix).t()
        torch.testing.assert_close(product, x @ weight.t())
        torch.testing.assert_close(rotate(rotate(x, matrix), matrix), x)


@pytest.mark.parametrize("columns, group", [
    (3840, 256), (10240, 256), (2560, 256), (9728, 256), (160, 16), (426, 0), (64, 64), (12, 4)])
def test_rotation_group(columns, group):
    assert rotation_group(columns) == group


def has_all(dtype, device):
    return True


def has_none(dtype, device):
    return False


def slow_scaled_mm(a, b, scale_a, scale_b, out_dtype):
    """torch._scaled_mm, which CPUs do not have for float8 everywhere."""
    assert out_dtype == torch.bfloat16        # no other one with a scale for each row on all cards
    return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)


@pytest.mark.parametrize("product, expected", [
    (slow_scaled_mm, True), (Failing(RuntimeError("not on this card")), False),
    (Failing(ValueError("not on Windows")), False), (lambda *_, **__: torch.zeros(32, 32), False)])
def test_float8_products_are_tried_once(monkeypatch, product, expected):
    calls = Recorder(product)
    monkeypatch.setattr(torch, "_scaled_mm", calls)
    hardware.multiplies_float8.cache_clear()
    assert [hardware.multiplies_float8(CPU) for _ in range(3)] == [expected] * 3
    hardware.multiplies_float8.cache_clear()
    assert len(calls.calls) == 1
    monkeypatch.setattr(hardware, "multiplies_float8", lambda device: expected)
    assert hardware.has_products(torch.float8_e4m3fn, CUDA) == expected
    assert not hardware.has_products(torch.float8_e4m3fn, CPU)
    assert not hardware.has_products(torch.float8_e4m3fn, torch.device("mps"))


def test_float8_is_refused_where_the_device_has_none():
    with pytest.raises(UserError, match="--weights fp8"):
        hardware.choose_numbers(Release(), torch.device("mps"), None, "fp8")
    assert hardware.choose_numbers(Release(), torch.device("mps"), None, None)[0] == "bfloat16"


@pytest.mark.parametrize("kind, sizes, limit", [
    ("fp8", (64, 48), 0.05), ("int8", (64, 48), 0.02), ("int8", (60, 44), 0.02),
    ("fp8", (60, 44), 0.05), ("int8", (426, 160), 0.02)])
@pytest.mark.parametrize("has_products", [has_all, has_none])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_layers(monkeypatch, kind, sizes, limit, has_products, dtype):
    """Near the product with the original weights, by both ways of multiplying, in both dtypes."""
    monkeypatch.setattr(hardware, "has_products", has_products)
    monkeypatch.setattr(torch, "_scaled_mm", slow_scaled_mm)
    net = nn.Sequential(nn.Linear(*sizes, bias=False))
    x = torch.randn(2, 5, sizes[0])
    expected = net(x).detach()
    hardware.quantize(net, kind)
    assert net[0].weight.dtype.itemsize == 1
    with torch.no_grad():
        y = net(x.to(dtype))
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert relative_error(y.float(), expected) < limit
    # With weights as they were rounded, and inputs that are not, the product is exact.
    if has_products is has_none and dtype == torch.float32:
        weight = net[0].weight.double() * net[0].scale
        if net[0].rotation is not None:
            weight = rotate(weight, net[0].rotation)
        assert relative_error(y, (x.double() @ weight.t()).float()) < 1e-6


def test_a_cpu_multiplies_int8_of_any_size(monkeypatch):
    """Only a GPU wants multiples of 16."""
    monkeypatch.setattr(hardware, "has_products", has_all)
    product = Recorder(torch._int_mm)
    monkeypatch.setattr(torch, "_int_mm", product)
    hardware.quantize(nn.Sequential(nn.Linear(426, 7, bias=False)), "int8")(torch.randn(3, 426))
    assert len(product.calls) == 1


def test_layers_do_not_share_a_rotation_that_moves():
    """Offloading replaces the data of a layer's tensors; the matrix is the same for all layers."""
    one, two = (nn.Linear(64, 16, bias=False) for _ in range(2))
    for layer in (one, two):
        hardware.quantize_layer(layer, layer.weight.detach(), "int8")
    assert one.rotation.data_ptr() == two.rotation.data_ptr()    # no memory of its own
    one.rotation.data = torch.zeros(64, 64)
    assert two.rotation.any() and hadamard(64).any()


def test_outliers_do_not_spoil_int8(monkeypatch):
    """One channel a hundred times larger: without rotation it takes the range of all others."""
    monkeypatch.setattr(hardware, "has_products", has_all)
    layer = nn.Linear(256, 64, bias=False)
    x = torch.randn(32, 256)
    x[:, 7] *= 100
    expected = layer(x).detach()
    errors = {}
    for group in (1, 256):
        rows, scale = quantize_rows(rotate(layer.weight.detach(), hadamard(group)), torch.int8)
        quantized = copy.deepcopy(layer)
        hardware.bind(quantized, rows, scale, group)
        small = expected - torch.outer(x[:, 7], layer.weight[:, 7]).detach()   # the other channels
        errors[group] = float((quantized(x) - expected).norm() / small.norm())
    assert errors[256] < 0.5 * errors[1]


def test_quantize_takes_the_blocks_only(pipeline):
    """Every layer without bias, and nothing else; a second call changes nothing."""
    plain = pipeline.dit.state_dict()
    dit = hardware.quantize(copy.deepcopy(pipeline.dit), "fp8")
    state = dit.state_dict()
    linear = {f"{name}.weight" for name, m in dit.named_modules()
              if isinstance(m, hardware.Float8Linear)}
    assert len(linear) == 7 * len([*dit.layers, *dit.noise_refiner, *dit.context_refiner])
    for name, weight in plain.items():
        expected = quantize_rows(weight, torch.float8_e4m3fn)[0] if name in linear else weight
        assert torch.equal(state[name].float(), expected.float()), name
    hardware.quantize(dit, "int8")
    assert all(torch.equal(dit.state_dict()[name].float(), state[name].float()) for name in state)


@torch.no_grad()
@pytest.mark.parametrize("kind, limit", [("fp8", 0.1), ("int8", 0.05)])
@pytest.mark.parametrize("has_products", [has_all, has_none])
def test_quantized_networks(pipeline, monkeypatch, kind, limit, has_products):
    monkeypatch.setattr(hardware, "has_products", has_products)
    monkeypatch.setattr(torch, "_scaled_mm", slow_scaled_mm)
    text = sampler.encode_prompts(pipeline, PROMPTS)
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([0.4, 0.9])
    v = pipeline.dit(x, t, text)
    dit = hardware.quantize(copy.deepcopy(pipeline.dit), kind)
    assert 1e-4 < relative_error(dit(x, t, text), v) < limit
    encoder = hardware.quantize(copy.deepcopy(pipeline.text_encoder), kind)
    quantized = sampler.Pipeline(**{**vars(pipeline), "text_encoder": encoder})
    features = sampler.encode_prompts(quantized, PROMPTS).features
    assert 1e-4 < relative_error(features, text.features) < limit


@pytest.mark.parametrize("kind, group", [("fp8", 0), ("int8", 0), ("int8", 256)])
def test_stored_scales_may_be_one_number(kind, group, monkeypatch):
    # Where there are int8 products, inputs are rounded too, and the difference is some .006.
    monkeypatch.setattr(hardware, "has_products", lambda dtype, device: False)
    layer = nn.Linear(256, 3, bias=False)
    weight = torch.randn(3, 256)
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    scale = weight.abs().max() / (448 if kind == "fp8" else 127)
    hardware.bind(layer, (weight / scale).round().to(dtype), scale, group)
    x = torch.randn(4, 256)
    back = layer.weight.float() * scale
    rotated = rotate(x, hadamard(group)) if group else x
    assert relative_error(layer(x), rotated @ back.t()) < 1e-5


@pytest.mark.parametrize("layout", ["ours", "official", "comfy"])
def test_the_table_of_words_stays_in_16_bits_beside_float32(tmp_path, layout):
    """Its rows are cast when they are used, so the features are the same to the last bit."""
    convert_weights.convert(TINY, tmp_path / "half", layout, dtype="bfloat16")
    model = convert_weights.open_model(tmp_path / "half")._replace(shift_assumed=False)
    plain = sampler.load_pipeline(model)
    kept = sampler.load_pipeline(model, keep=TABLE)
    table = kept.text_encoder.embed_tokens.weight
    assert table.dtype == torch.bfloat16
    others = {p.dtype for p in hardware.tensors_of(kept.text_encoder.layers, kept.dit)}
    assert others == {torch.float32}
    features = [sampler.encode_prompts(p, ["a cat"]).features for p in (plain, kept)]
    assert features[1].dtype == torch.float32 and torch.equal(*features)


@pytest.mark.parametrize("device, dtype, kept", [
    ("cpu", "float32", {"int8", "table"}), ("cuda", "float32", {"int8", "table"}),
    ("mps", "float32", {"int8"}), ("cpu", "bfloat16", {"int8"}), ("cuda", None, {"int8"})])
def test_what_stays_as_it_is_stored(device, dtype, kept):
    """Apple's GPUs do not know all types that a table may have."""
    assert hardware.choose_numbers(Release(), torch.device(device), dtype, None)[2] == kept


@pytest.mark.parametrize("keep", [None, TABLE])
def test_a_damaged_table_of_words_is_refused(tmp_path, keep):
    convert_weights.convert(TINY, tmp_path / "half", dtype="bfloat16")
    file = tmp_path / "half" / "text_encoder.safetensors"
    tensors = load_file(file)
    tensors["embed_tokens.weight"][3, 3] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match="embed_tokens.weight is not finite"):
        sampler.load_pipeline(tmp_path / "half", keep=keep)


# --- Kernels for CPUs -----------------------------------------------------------------------------


@pytest.fixture
def with_bfloat16(monkeypatch):
    monkeypatch.setattr(hardware, "CPU_HAS_BFLOAT16", True)


@pytest.fixture
def without_bfloat16(monkeypatch):
    monkeypatch.setattr(hardware, "CPU_HAS_BFLOAT16", False)


@pytest.mark.parametrize("identifier, expected", [
    ("Intel64 Family 6 Model 207 Stepping 2, GenuineIntel", True),
    ("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", False), ("", False)])
def test_whose_processor_it_is(monkeypatch, tmp_path, identifier, expected):
    """By the environment, as on Windows, and by the first lines of Linux's /proc/cpuinfo."""
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", identifier)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert hardware.is_intel() == expected
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", "")
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nvendor_id\t: {identifier.rpartition(' ')[2]}\ncpu family\t: 6\n")
    assert hardware.is_intel() == expected


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 40, 16), (1, 4, 1200, 8)])    # heads at once; in turn
def test_attention_as_two_products(shape, is_masked, monkeypatch):
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    mask = (torch.rand(shape[0], 1, 1, shape[2]) > 0.3) if is_masked else None
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    attend = hardware.Bfloat16Attention.attend
    assert relative_error(attend(q, k, v, attn_mask=mask), exact) < 1e-2     # with gradients on
    monkeypatch.setattr(F, "scaled_dot_product_attention", Failing(KeyError()))
    with torch.no_grad():
        assert relative_error(attend(q, k, v, attn_mask=mask), exact) < 1e-2


def classes_of(net):
    return {type(layer) for layer in net.modules()}


def large_and_small(dtype):
    return nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 48, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype, bfloat16_is_fast, classes", [
    (torch.float32, False, [hardware.CPULinear, nn.Linear]),
    (torch.float32, True, [hardware.CPULinear, nn.Linear]),
    (torch.bfloat16, False, [hardware.CPULinear, hardware.CPULinear]),
    (torch.bfloat16, True, [nn.Linear, nn.Linear])])
def test_which_layers_get_another_kernel(monkeypatch, dtype, bfloat16_is_fast, classes):
    monkeypatch.setattr(hardware, "CPU_HAS_BFLOAT16", bfloat16_is_fast)
    net = large_and_small(dtype)
    assert [type(layer) for layer in hardware.use_cpu_kernels(net)] == classes
    for has_amx in (False, True):             # with AMX PyTorch's own attention is faster
        monkeypatch.setattr(hardware, "CPU_HAS_AMX", has_amx)
        attention = nn.Sequential(Attention(32, 2, 2, 16, 1e-5, rotate_pairs).to(dtype))
        hardware.use_cpu_kernels(attention)
        is_replaced = dtype == torch.bfloat16 and bfloat16_is_fast and not has_amx
        assert isinstance(attention[0], hardware.Bfloat16Attention) == is_replaced
        # A kernel that is named takes the place of ours.
        hardware.use_attention(attention, "math")
        assert type(attention[0]) is Attention
        assert attention[0].attend.args[1] is Attention.attend


def test_linear_by_onednn(monkeypatch):
    net = large_and_small(torch.float32)
    x = torch.randn(2, 5, 1024)
    expected = net(x).detach()
    hardware.use_cpu_kernels(net)
    assert relative_error(net(x).detach(), expected) < 1e-6
    assert net(x).requires_grad                                  # with gradients PyTorch's own
    with torch.no_grad():
        hidden = nn.Sequential(net[0])(x)
        monkeypatch.setattr(F, "linear", Failing(KeyError()))
        assert relative_error(net[0](x), hidden) < 1e-6


def test_bfloat16_where_its_products_are_slow(without_bfloat16, monkeypatch):
    """Multiplied in float32, and rounded once."""
    net = hardware.use_cpu_kernels(large_and_small(torch.bfloat16))
    x = torch.randn(2, 5, 1024).bfloat16()
    exact = x.double() @ net[0].weight.double().t() + net[0].bias.double()
    product = Recorder(hardware.float32_product)
    monkeypatch.setattr(hardware, "float32_product", product)
    with torch.no_grad():
        y = net[0](x)
    assert y.dtype == torch.bfloat16
    assert (y != exact.bfloat16()).float().mean() < 0.01
    assert [arguments[0].dtype for arguments in product.calls] == [torch.float32]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_kernels_change_no_picture(pipeline, with_bfloat16, dtype, limit):
    options = dict(prompts=PROMPTS, height=32, width=32, steps=2, output="latent")
    expected = sampler.generate(sampler.load_pipeline(TINY, dtype=dtype), **options)
    fast = sampler.load_pipeline(TINY, dtype=dtype)
    for net in (fast.text_encoder, fast.dit, fast.vae):
        hardware.use_cpu_kernels(net)
    assert relative_error(sampler.generate(fast, **options), expected) < limit


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("apply", [
    hardware.use_cpu_kernels, lambda net: hardware.quantize(net, "int8"),
    lambda net: hardware.quantize(net, "fp8"), lambda net: hardware.use_attention(net, "math")])
def test_changed_networks_compile_to_one_graph(pipeline, apply):
    dit = copy.deepcopy(pipeline.dit)
    apply(dit)
    x, t = torch.randn(2, 16, 6, 8), torch.tensor([0.2, 0.7])
    context = dit.prepare(sampler.encode_prompts(pipeline, PROMPTS), 6, 8)
    expected = dit(x, t, context)
    torch._dynamo.reset()
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, t, context), expected) < 1e-4


def test_freed_memory_is_kept_where_glibc_is(monkeypatch):
    class Library:
        mallopt = Recorder(lambda *arguments: 1)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    hardware.keep_freed_memory()
    assert {call[0] for call in Library.mallopt.calls} == {-1, -3}   # as in malloc.h
    for error in (OSError(), TypeError(), AttributeError()):     # no such library, Windows, musl
        monkeypatch.setattr(ctypes, "CDLL", Failing(error))
        hardware.keep_freed_memory()


# --- One image on several devices -----------------------------------------------------------------


def draw_in_parallel(rank, processes, folder):
    """One of several processes, each of which computes a share of the tokens."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                            world_size=processes)
    pipeline = sampler.load_pipeline(TINY)
    hardware.split_tokens(pipeline.dit)
    latents = sampler.generate(pipeline, **{**OPTIONS, "output": "latent"})
    torch.save(latents, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_split_tokens(pipeline, tmp_path, processes):
    """Every process gets the latents of a single one; a ragged batch, with guidance."""
    torch.multiprocessing.spawn(draw_in_parallel, (processes, str(tmp_path)), processes)
    expected = sampler.generate(pipeline, **{**OPTIONS, "output": "latent"})
    for rank in range(processes):
        assert relative_error(torch.load(tmp_path / f"{rank}.pt"), expected) < 1e-5


# --- Does it fit? ---------------------------------------------------------------------------------


class OfficialPiece:
    """One tensor of the release, without its numbers."""
    needed = True

    def __init__(self, shape, number_type):
        self.shape = shape
        scales = (1, None) if number_type == "I8" else (None, None)
        self.stored = formats.Stored(None, "", number_type, shape, 0, 0, "plain", scales)
        if number_type == "I8":
            self.stored = self.stored._replace(format="int8_tensorwise")


class OfficialNetwork:
    def __init__(self, kind, shapes, in_blocks):
        self.kind = kind
        self.config = NETWORKS[kind][1]()
        self.pieces = {name: OfficialPiece(shape, in_blocks if QUANTIZED.search(name) else "BF16")
                       for name, shape in shapes.items()}


class Release:
    """A checkpoint of the release's sizes. in_blocks: how the blocks' weights are stored."""

    def __init__(self, in_blocks="BF16"):
        shapes = json.loads((DATA / "official_tensors.json").read_text(encoding="utf-8"))
        kinds = {"text_encoder": "text_encoder", "dit": "transformer", "vae": "vae"}
        self.networks = {kind: OfficialNetwork(kind, shapes[name]["tensors"], in_blocks)
                         for kind, name in kinds.items()}


SIZE, CUDA = (2 ** 20, 1), torch.device("cuda")


@pytest.mark.parametrize("weights, offload, gigabytes", [
    (None, None, 26), (None, "networks", 13), ("int8", "networks", 7), ("int8", None, 17),
    (None, "blocks", 2.4)])
def test_memory_of_the_release(weights, offload, gigabytes):
    choice = hardware.Choice(torch.bfloat16, weights, offload)
    needed = hardware.memory_needed(Release().networks, SIZE, choice)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize("in_blocks, choice, gigabytes", [
    ("BF16", (torch.bfloat16,), 5.58),            # all mapped but the VAE; its activations
    ("BF16", (torch.float32,), 44.7),             # but for the table of words
    ("BF16", (torch.bfloat16, "int8"), 15.2),
    ("BF16", (torch.bfloat16, None, None, (), True), 17.9),      # a LoRA changes the DiT
    ("I8", (torch.bfloat16,), 5.58),              # int8 as it is stored
    ("I8", (torch.float32,), 6.14),               # norms and embedders are cast, words are not
    ("I8", (torch.bfloat16, None, None, ()), 24.9)])
def test_memory_on_a_cpu(in_blocks, choice, gigabytes):
    """What is used as it is stored does not count: the system reads it again when it must."""
    choice = hardware.Choice(*choice)._replace(is_mapped=True)
    needed = hardware.memory_needed(Release(in_blocks).networks, SIZE, choice)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize("device, dtype, free, offers, others", [
    ("cuda", torch.bfloat16, 15.7e9, ["--offload needs 12.9", "--weights int8 --offload needs"],
     ["--weights int8 needs"]),
    ("cuda", torch.bfloat16, 3e9, ["--offload blocks"], ["--offload needs"]),
    ("cuda", torch.bfloat16, 1e9, ["smaller --size"], ["needs 1"]),
    ("cpu", torch.float32, 30e9, ["--dtype bfloat16 needs", "--weights int8 needs"],
     ["--offload"]),
    ("cuda", torch.bfloat16, 24e9, ["--tile needs 22.7", "--offload needs"], ["True"]),
    ("cpu", torch.bfloat16, 3e9, ["--tile needs"], []),
    ("cpu", torch.bfloat16, 2e9, ["smaller --size"], [])])
def test_what_makes_it_fit_is_named(monkeypatch, device, dtype, free, offers, others):
    monkeypatch.setattr(hardware, "free_memory", lambda device: free)
    with pytest.raises(UserError) as caught:
        hardware.check_memory(Release(), torch.device(device), SIZE, hardware.Choice(dtype))
    assert all(words in str(caught.value) for words in offers), caught.value
    assert not any(words in str(caught.value) for words in others), caught.value


@pytest.mark.parametrize("pixels, tile, gigabytes", [
    (2 ** 20, None, 25.7), (2 ** 20, True, 22.5), (2 ** 20, False, 25.7),
    (2 ** 22, None, 23.0), (2 ** 22, False, 41.5)])
def test_memory_of_the_vae_in_tiles(pixels, tile, gigabytes):
    choice = hardware.Choice(torch.bfloat16, tile=tile)
    needed = hardware.memory_needed(Release().networks, (pixels, 1), choice)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_layers_that_an_adapter_changes_are_not_kept():
    """They are dequantized. With --weights int8 they take one byte again."""
    dit = Release("I8").networks["dit"]
    kept, changed, again = (
        hardware.weight_bytes(dit, hardware.Choice(torch.bfloat16, weights, is_merged=merged))
        for weights, merged in ((None, False), (None, True), ("int8", True)))
    assert kept == again and changed == pytest.approx(2 * kept, rel=0.05)


@pytest.mark.parametrize("device, free", [("cuda", 80e9), ("cuda", None), ("cpu", 8e9)])
def test_what_fits_is_not_refused(monkeypatch, device, free):
    """On a CPU the weights in their own dtype are mapped."""
    monkeypatch.setattr(hardware, "free_memory", lambda device: free)
    hardware.check_memory(Release(), torch.device(device), SIZE, hardware.Choice(torch.bfloat16))


def test_free_memory():
    assert hardware.free_memory(CPU) is None or 1e7 < hardware.free_memory(CPU) < 1e14
    assert hardware.free_memory(torch.device("mps")) is None


@pytest.mark.parametrize("text, expected", [
    ("MemTotal: 9 kB\nMemAvailable:  30 kB\nSwapTotal: 7 kB\nSwapFree:  5 kB\n", 35 * 1024),
    ("MemTotal: 9 kB\n", None)])
def test_swap_counts_as_free(monkeypatch, text, expected):
    monkeypatch.setattr(hardware.Path, "read_text", lambda path: text)
    assert hardware.free_memory(CPU) == expected
