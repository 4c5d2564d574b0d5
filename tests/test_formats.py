"""Files of other programs: names, adapters, GGUF, quantized weights (tests/data/formats)."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_weights
import formats
import fuzz_files
import hardware
from conftest import DATA, TINY, relative_error
from convert_weights import UserError, load_dit, load_text_encoder, load_vae, official_tensors
from model import Text

FORMATS = DATA / "formats"
PLACES = {"dit": TINY / "transformer", "text_encoder": TINY / "text_encoder", "vae": TINY / "vae"}
INPUTS = load_file(FORMATS / "inputs.safetensors")


def official(kind="dit", path=None, adapters=()):
    """The official tensors of a network on disk, by name."""
    network = convert_weights.open_network(kind, path or PLACES[kind], PLACES[kind])
    return dict(official_tensors(network, adapters))


@torch.no_grad()
def velocity(dit):
    text = Text(INPUTS["caption"][None], torch.tensor([9]))
    return dit(INPUTS["x"], INPUTS["t"], text)


def sha(tensor):
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The tiny checkpoint as ComfyUI has it, one file for each network."""
    target = tmp_path_factory.mktemp("comfy") / "files"
    convert_weights.convert(TINY, target, to="comfy")
    return {"dit": target / "z_image.safetensors", "vae": target / "ae.safetensors",
            "text_encoder": target / "qwen_3_4b.safetensors"}


@pytest.fixture(scope="module")
def weights():
    return {kind: official(kind) for kind in PLACES}


def header(path):
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: [part.get_dtype(), list(part.get_shape())] for name, part in slices.items()}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, folder", [("dit", "comfy_names"), ("vae", "flux_vae")])
def test_names_are_those_of_the_other_programs(comfy, kind, folder):
    """What we write has names, types and shapes of the files that the programs themselves write."""
    assert header(comfy[kind]) == json.loads((FORMATS / folder / "names.json").read_text())


def test_the_dit_in_comfy_names(comfy, weights):
    tensors = official(path=comfy["dit"])
    hashes = json.loads((FORMATS / "comfy_names/expected_sha256_16.json").read_text())
    assert {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha(tensor)]
            for name, tensor in tensors.items()} == hashes
    expected = load_file(FORMATS / "comfy_names/expected.safetensors")["output"]
    assert relative_error(velocity(load_dit(comfy["dit"], like=PLACES["dit"])), expected) < 1e-5


@torch.no_grad()
def test_the_vae_in_flux_names(comfy):
    case = load_file(FORMATS / "flux_vae/expected.safetensors")
    vae = load_vae(comfy["vae"], like=PLACES["vae"])
    decoded = vae.decode(case["latent"])
    assert relative_error(decoded, case["decoded"]) < 1e-5
    mean, _ = vae.moments(decoded.clamp(-1, 1))
    assert relative_error(mean, case["encoded_mean_of_clamped"]) < 1e-5


@pytest.mark.parametrize("kind, prefix", [
    *(("dit", prefix) for prefix in
      ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")),
    ("vae", "vae."), ("vae", "first_stage_model."),
    ("text_encoder", "text_encoders.qwen3_4b.transformer."),
])
@pytest.mark.parametrize("names", ["comfy", "official"])
def test_prefixes(tmp_path, comfy, weights, kind, prefix, names):
    tensors = load_file(comfy[kind]) if names == "comfy" else weights[kind]
    file = tmp_path / "misleading name, vae.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    assert_same(official(kind, file), weights[kind])


def test_all_in_one(tmp_path, comfy, weights):
    """As ComfyUI's checkpoint node writes it, with the leftovers that are dropped."""
    tensors = {f"model.diffusion_model.{n}": t for n, t in load_file(comfy["dit"]).items()}
    tensors |= {f"text_encoders.qwen3_4b.transformer.{n}": t
                for n, t in load_file(comfy["text_encoder"]).items()}
    tensors |= {f"vae.{n}": t for n, t in load_file(comfy["vae"]).items()}
    tensors["model.diffusion_model.norm_final.weight"] = torch.full((48,), torch.nan)
    tensors["text_encoders.qwen3_4b.logit_scale"] = torch.ones(())
    file = tmp_path / "all.safetensors"
    save_file(tensors, file)
    for kind in PLACES:
        assert_same(official(kind, file), weights[kind])
    save_file({**tensors, "cond_stage_model.x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="cond_stage_model.x"):
        official("dit", file)


def test_one_dimensional_pad_tokens_and_mixed_types(tmp_path, weights):
    tensors = {name: tensor.float() if "norm" in name else tensor
               for name, tensor in weights["dit"].items()}
    tensors |= {name: tensors[name].flatten() for name in ("x_pad_token", "cap_pad_token")}
    save_file(tensors, tmp_path / "mixed.safetensors")
    for name, tensor in official(path=tmp_path / "mixed.safetensors").items():
        assert torch.equal(tensor, weights["dit"][name].to(tensor.dtype)), name


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bf16.safetensors",
                                  "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"])
def test_variants_of_file_names(tmp_path, weights, name):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((TINY / "transformer/config.json").read_bytes())
    save_file(weights["dit"], folder / name)
    if "-of-" in name:
        index = {"weight_map": dict.fromkeys(weights["dit"], name)}
        (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
            json.dumps(index))
    assert_same(official(path=folder), weights["dit"])


@pytest.mark.parametrize("name, words", [
    ("layers.0.attention.to_q.qweight", "nunchaku"),
    ("layers.0.attention.to_q.zero_point", "SDNQ"),
    ("layers.0.attention.to_q.weight.absmax", "bitsandbytes"),
    ("layers.0.attention.to_q.weight._data", "quanto"),
    ("layers.0.attention.to_q.scales", "MLX"),
    ("layers.0.encoded_exponent", "DFloat11"),
    ("layers.0.attention.to_q.scale", "SDNQ"),
    ("control_layers.0.after_proj.weight", "ControlNet"),
    ("model.diffusion_model.control_layers.0.after_proj.weight", "ControlNet"),
    ("siglip_embedder.1.weight", "Omni"),
    ("t_embedder_2.mlp.0.weight", "TwinFlow"),
    ("layers.0.attention.to_q.lora_A.weight", "adapter"),
    ("a_stranger", "unexpected: a_stranger"),
])
def test_what_is_refused_by_name(tmp_path, weights, name, words):
    save_file({**weights["dit"], name: torch.zeros(1)}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=words):
        official(path=tmp_path / "dit.safetensors")


@pytest.mark.parametrize("key", ["mflux_version", "quantization_level"])
def test_files_of_mflux_are_refused(tmp_path, weights, key):
    save_file(weights["dit"], tmp_path / "dit.safetensors", {key: "8"})
    with pytest.raises(UserError, match=f"MLX.*{key}.*bfloat16"):
        official(path=tmp_path / "dit.safetensors")


@pytest.mark.parametrize("start, words", [
    (b"PK\x03\x04", "pickle"), (b"\x80\x02}q", "pickle"), (b"<!DOCTYPE html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"", "no complete"),
])
def test_what_is_no_checkpoint_at_all(tmp_path, start, words):
    (tmp_path / "file.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=words):
        official(path=tmp_path / "file.safetensors")


def test_sizes_of_other_models(tmp_path, weights):
    """A Lumina has the same names; so has every Qwen3. Without `like` the release is expected."""
    save_file(weights["dit"], tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="another model.*cap_embedder.1.weight"):
        load_dit(tmp_path / "dit.safetensors")


# --- Adapters -----------------------------------------------------------------------------------

LORA = FORMATS / "lora"
CASES = json.loads((LORA / "cases.json").read_text())


def changed(before, after):
    return {name for name in before if not torch.equal(before[name].float(), after[name].float())}


@pytest.mark.parametrize("file", [file for file, case in CASES.items() if case != "refuse"])
def test_adapters(file, weights):
    case = LORA / CASES[file]
    with safe_open(case, "pt") as opened:
        names = set(json.loads(opened.metadata()["changed"]))
    before, after = weights["dit"], official(adapters=[(LORA / file, 1.0)])
    assert changed(before, after) == names
    expected = load_file(case)
    output = expected.pop("output")
    assert expected.keys() <= names
    for name, tensor in expected.items():
        delta = before[name].float()
        assert relative_error(after[name] - delta, tensor - delta) < 5e-6, name
    net = load_dit(PLACES["dit"], adapters=[(LORA / file, 1.0)])
    assert relative_error(velocity(net), output) < 1e-5


def test_strength_and_several_adapters(weights):
    file, other = LORA / "aitoolkit_lora_a_b.safetensors", LORA / "lycoris_loha.safetensors"
    base, one = weights["dit"], official(adapters=[(file, 1.0)])
    both = official(adapters=[(file, -0.5), (other, 1.0), (file, 1.0)])
    loha = official(adapters=[(other, 1.0)])
    for name, tensor in both.items():
        expected = base[name].float() + 0.5 * (one[name].float() - base[name].float())
        expected = expected + loha[name].float() - base[name].float()
        assert torch.allclose(tensor.float(), expected, atol=1e-6), name


def lora(tensors, tmp_path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors"


SPLIT = load_file(LORA / "kohya_split_alpha.safetensors")
DOTTED = load_file(LORA / "aitoolkit_lora_a_b.safetensors")
BARE = {name.removeprefix("diffusion_model."): tensor for name, tensor in DOTTED.items()}


@pytest.mark.parametrize("prefix", [
    "", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.",
    "base_model.model.diffusion_model.", "base_model.model.transformer."])
@pytest.mark.parametrize("down, up", [
    (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"), (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"), (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")])
def test_spellings_of_a_lora(tmp_path, prefix, down, up):
    spelt = {prefix + name.replace(".lora_A.weight", down).replace(".lora_B.weight", up): tensor
             for name, tensor in BARE.items()}
    expected = official(adapters=[(LORA / "aitoolkit_lora_a_b.safetensors", 1.0)])
    assert_same(official(adapters=[(lora(spelt, tmp_path), 1.0)]), expected)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"])
def test_flattened_names_and_ranks_of_their_own(tmp_path, prefix):
    """Each module has a rank and an alpha; here one is stored with twice the rank, half of it 0."""
    tensors = {name.replace("lora_unet_", prefix): tensor for name, tensor in SPLIT.items()}
    stem = f"{prefix}layers_0_feed_forward_w1"
    for part, axis in ((f"{stem}.lora_down.weight", 0), (f"{stem}.lora_up.weight", 1)):
        tensors[part] = torch.cat((tensors[part], torch.zeros_like(tensors[part])), axis)
    tensors[f"{stem}.alpha"] = 2 * tensors[f"{stem}.alpha"].to(torch.bfloat16)
    after = official(adapters=[(lora(tensors, tmp_path), 1.0)])
    expected = official(adapters=[(LORA / "kohya_split_alpha.safetensors", 1.0)])
    for name, tensor in expected.items():
        assert torch.allclose(after[name].float(), tensor.float(), atol=1e-7), name


def block_diagonal():
    """q, k, v of layer 0 as musubi's converter writes them: A stacked, B on the diagonal."""
    stems = [f"lora_unet_layers_0_attention_to_{letter}" for letter in "qkv"]
    a = torch.cat([SPLIT[f"{stem}.lora_down.weight"] for stem in stems])
    b = torch.block_diag(*(SPLIT[f"{stem}.lora_up.weight"] for stem in stems))
    fused = "lora_unet_layers_0_attention_qkv"
    return {f"{fused}.lora_down.weight": a, f"{fused}.lora_up.weight": b,
            f"{fused}.alpha": 3 * SPLIT[f"{stems[0]}.alpha"]}


def test_block_diagonal_qkv(tmp_path):
    tensors = {name: tensor for name, tensor in SPLIT.items()
               if "layers_0_attention_to_" not in name or "to_out" in name}
    after = official(adapters=[(lora({**tensors, **block_diagonal()}, tmp_path), 1.0)])
    expected = official(adapters=[(LORA / "kohya_split_alpha.safetensors", 1.0)])
    for name, tensor in expected.items():
        assert torch.allclose(after[name].float(), tensor.float(), atol=1e-7), name


def test_what_is_said_twice_counts_once(tmp_path):
    out = {name.replace("to_out_0", "out"): tensor.clone() for name, tensor in SPLIT.items()
           if "_layers_0_attention_to_out_0" in name}
    twice = {**SPLIT, **block_diagonal(), **out}
    expected = official(adapters=[(LORA / "kohya_split_alpha.safetensors", 1.0)])
    assert_same(official(adapters=[(lora(twice, tmp_path), 1.0)]), expected)
    up = "lora_unet_layers_0_attention_out.lora_up.weight"
    twice[up] = 2 * twice[up]
    with pytest.raises(UserError, match="two different things.*to_out"):
        official(adapters=[(lora(twice, tmp_path), 1.0)])


@pytest.mark.parametrize("settings, scale", [
    ({"lora_alpha": 3.0, "r": 2}, 1.5),
    ({"lora_alpha": 3.0, "use_rslora": True}, 3 / 2 ** 0.5),
    ({"lora_alpha": 3.0, "alpha_pattern": {"attention.to_q": 5.0}}, 1.5),
    ({"alpha_pattern": {r"^layers\.\d+\.feed_forward\.w1": 6}}, 1.0),
    # Of several patterns that fit, peft takes the first.
    ({"lora_alpha": 3.0, "alpha_pattern": {"attention.to_q": 5.0, "to_q": 9.0}}, 1.5),
])
def test_settings_of_peft(tmp_path, weights, settings, scale):
    """From the header as diffusers writes it, and from the file that peft writes beside."""
    scales = {"layers.0.attention.to_q.weight": 2.5 if scale == 1.5 and len(settings) == 2
              and "alpha_pattern" in settings else scale,
              "layers.0.feed_forward.w1.weight": 3.0 if "lora_alpha" not in settings else scale}
    one = official(adapters=[(LORA / "aitoolkit_lora_a_b.safetensors", 1.0)])
    text = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    in_header = lora({f"transformer.{name}": tensor for name, tensor in BARE.items()}, tmp_path,
                     {"lora_adapter_metadata": text})
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in BARE.items()},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for adapter in (in_header, folder):
        after = official(adapters=[(adapter, 1.0)])
        for name, factor in scales.items():
            base = weights["dit"][name].float()
            assert torch.allclose(after[name], base + factor * (one[name] - base), atol=1e-6), name


@pytest.mark.parametrize("settings, good", [
    ({"init_lora_weights": "pissa"}, False), ({"init_lora_weights": "pissa_niter_4"}, False),
    ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "rank_pattern": {}}, True),
    ({"init_lora_weights": True, "bias": "none", "modules_to_save": None}, True),
    ({"bias": "all"}, False), ({"modules_to_save": ["x_embedder"]}, False),
    ({"layer_replication": [[0, 1]]}, False), ({"lora_bias": True}, False),
    ({"use_dora": True}, False), ({"use_rslora": "false"}, False), ({"peft_type": "LOHA"}, False)])
def test_settings_of_peft_that_are_refused(settings, good):
    """Such a file is more than the product of its two matrices."""
    if good:
        formats.check_peft(settings, "adapter")
    else:
        with pytest.raises(UserError, match=f"adapter.*{next(iter(settings))}"):
            formats.check_peft(settings, "adapter")


@pytest.mark.parametrize("name, shape, words", [
    ("layers.0.attention.to_q.dora_scale", (48, 1), "DoRA"),
    ("layers.0.attention.to_q.lora_magnitude_vector", (48,), "DoRA"),
    ("layers.0.attention.to_q.oft_blocks", (2, 2), "OFT"),
    ("layers.0.attention.to_q.lokr_t2", (2, 2), "convolutions"),
    ("layers.0.attention.to_q.diff", (48, 48), "more than linear weights"),
    ("layers.0.attention.to_q.lora_B.bias", (48,), "more than linear weights"),
    ("text_encoder.layers.0.q_proj.lora_A.weight", (2, 32), "text encoder"),
    ("lora_te1_layers_0_q_proj.lora_down.weight", (2, 32), "text encoder"),
    ("layers.7.attention.to_q.lora_A.weight", (2, 48), "layers.7"),
    ("layers.0.attention_norm1.lora_A.weight", (2, 48), "attention_norm1"),
    ("layers.1.attention.to_q.lora_A.weight", (2, 48), "has only A"),
    ("layers.1.attention.to_q.alpha", (), "has only alpha"),
    ("layers.0.attention.to_q.lora_down.weight", (2, 48), "twice.*to_q"),
    ("layers.0.attention.to_q.lora_B.default.weight", (48, 2), "twice.*to_q"),
    ("a_stranger", (1,), "a_stranger"),
])
def test_adapters_that_are_refused(tmp_path, name, shape, words):
    """Nothing is applied in part: a tensor that cannot be used is an error that names it."""
    file = lora({**BARE, name: torch.zeros(shape)}, tmp_path)
    with pytest.raises(UserError, match=words):
        load_dit(PLACES["dit"], adapters=[(file, 1.0)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_adapter_is_to_blame(tmp_path, value):
    name = "layers.0.feed_forward.w1.lora_B.weight"
    broken = {**BARE, name: BARE[name].clone()}
    broken[name][-1, 0] = value
    with pytest.raises(UserError, match=f"lora.safetensors: {name} is not finite"):
        load_dit(PLACES["dit"], adapters=[(lora(broken, tmp_path), 1.0)])
    with pytest.raises(UserError, match="too large.*--dtype"):
        load_dit(PLACES["dit"], dtype=torch.float16, adapters=[(lora(BARE, tmp_path), 1e9)])


def test_dora_of_lycoris_is_refused():
    with pytest.raises(UserError, match="DoRA"):
        load_dit(PLACES["dit"], adapters=[(LORA / "dora_refuse.safetensors", 1.0)])


def test_adapters_of_another_width(tmp_path):
    wide = {name: torch.zeros(2, 64) if "lora_A" in name else tensor
            for name, tensor in BARE.items()}
    with pytest.raises(UserError, match="another model"):
        load_dit(PLACES["dit"], adapters=[(lora(wide, tmp_path), 1.0)])
    with pytest.raises(UserError, match="no adapter"):
        load_dit(PLACES["dit"], adapters=[(TINY / "vae/diffusion_pytorch_model.safetensors", 1.0)])
    with pytest.raises(UserError, match="it holds no tensors"):
        load_dit(PLACES["dit"], adapters=[(lora({}, tmp_path), 1.0)])
    with pytest.raises(UserError, match="alpha is nan"):
        broken = {**SPLIT, "lora_unet_layers_0_attention_to_q.alpha": torch.tensor(torch.nan)}
        load_dit(PLACES["dit"], adapters=[(lora(broken, tmp_path), 1.0)])


def test_alpha_may_be_an_integer_and_matrices_may_not(tmp_path):
    alphas = {name: tensor.round().to(torch.int64) for name, tensor in SPLIT.items()
              if name.endswith("alpha")}
    floats = {name: tensor.float() for name, tensor in alphas.items()}
    file = lora(SPLIT | floats, tmp_path)
    expected = official(adapters=[(file, 1.0)])
    found = official(adapters=[(lora(SPLIT | alphas, tmp_path), 1.0)])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    integers = {name: tensor.to(torch.int64) for name, tensor in SPLIT.items()}
    with pytest.raises(UserError, match="numbers of type I64"):
        load_dit(PLACES["dit"], adapters=[(lora(integers, tmp_path), 1.0)])


# --- GGUF and quantized weights -----------------------------------------------------------------


@pytest.mark.parametrize("kind, file, expected, hashes", [
    ("dit", "gguf/dit_q8_0_sdcpp.gguf", "gguf/expected_dit_q8_0_sdcpp.safetensors",
     "gguf/expected_dit_q8_0_sdcpp_float32_sha.json"),
    ("text_encoder", "gguf/text_encoder_q8_0_llamacpp.gguf",
     "gguf/expected_text_encoder_q8_0.safetensors", None),
    ("dit", "comfy_quantized/dit_fp8_comfy_quant.safetensors",
     "comfy_quantized/expected_dit_fp8_comfy_quant.safetensors",
     "comfy_quantized/expected_dit_fp8_comfy_quant_float32_sha.json"),
    ("dit", "comfy_quantized/dit_int8_convrot.safetensors",
     "comfy_quantized/expected_dit_int8_convrot.safetensors",
     "comfy_quantized/expected_dit_int8_convrot_float32_sha.json"),
    ("text_encoder", "comfy_quantized/text_encoder_fp8_plain_cast.safetensors",
     "comfy_quantized/expected_text_encoder_fp8_plain_cast.safetensors", None),
])
def test_quantized_files(kind, file, expected, hashes):
    """Bit for bit what the programs themselves dequantize, and the same outputs."""
    if file.startswith("gguf"):
        pytest.importorskip("gguf")
    tensors = {name: tensor.float() for name, tensor in official(kind, FORMATS / file).items()}
    expected = load_file(FORMATS / expected)
    assert sum(name in tensors for name in expected) >= 2
    for name in expected.keys() & tensors.keys():
        assert torch.equal(tensors[name], expected[name]), name
    if hashes:
        wanted = json.loads((FORMATS / hashes).read_text())
        assert {name: sha(tensor) for name, tensor in tensors.items()} == wanted
    if "output" in expected:
        dit = load_dit(FORMATS / file, like=PLACES["dit"])
        assert relative_error(velocity(dit), expected["output"]) < 1e-5
    if "features" in expected:
        encoder = load_text_encoder(FORMATS / file, like=PLACES["text_encoder"])
        with torch.no_grad():
            text = encoder(expected["ids"], torch.tensor([expected["ids"].shape[1]]))
        assert relative_error(text.features, expected["features"]) < 1e-5


def test_all_types_of_gguf():
    pytest.importorskip("gguf")
    tensors, _ = formats.read_header(FORMATS / "gguf/all_types.gguf")
    expected = load_file(FORMATS / "gguf/expected_all_types.safetensors")
    assert len(expected) == 15
    for name, values in expected.items():
        assert torch.equal(formats.dequantize(tensors[name], 0, (2, 512)).float(), values), name
        row = formats.dequantize(tensors[name], 1, (1, 512))
        assert torch.equal(row.float(), values[1:]), name


def test_gguf_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        official(path=FORMATS / "gguf/dit_q8_0_sdcpp.gguf")


@pytest.mark.parametrize("name", ["nvfp4_layers", "mxfp8_layers"])
def test_formats_with_tiled_scales(name):
    file = FORMATS / f"comfy_quantized/{name}.safetensors"
    weights = formats.with_scales(*formats.read_header(file))
    expected = load_file(FORMATS / f"comfy_quantized/expected_{name}.safetensors")
    for layer, values in expected.items():
        assert formats.fits(weights[layer], values.shape)
        assert torch.equal(formats.dequantize(weights[layer], 0, values.shape), values)
        if "qkv" in layer:                        # the second of three that are stacked
            part = formats.dequantize(weights[layer], 48, (48, 48))
            assert torch.equal(part, values[48:96])


def float8(tensor):
    scale = tensor.float().abs().max() / 448
    return (tensor.float() / scale).to(torch.float8_e4m3fn), scale


def test_float8_of_2025(tmp_path, weights):
    """The older spelling: a marker, scale_weight, scale_input."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    expected = {}
    for name, tensor in weights["text_encoder"].items():
        if tensor.ndim == 2 and "embed" not in name:
            q, scale = float8(tensor)
            layer = name.removesuffix("weight")
            tensors |= {name: q, f"{layer}scale_weight": scale, f"{layer}scale_input": scale + 1}
            expected[name] = q.float() * scale
        else:
            tensors[name] = expected[name] = tensor
    save_file(tensors, tmp_path / "old.safetensors")
    assert_same(official("text_encoder", tmp_path / "old.safetensors"), expected)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("described", ["header", "nested", "no"])
def test_descriptions_of_quantized_layers(tmp_path, comfy, rowwise, described):
    tensors, layer = load_file(comfy["dit"]), "layers.0.attention.qkv"
    q, scale = float8(tensors[f"{layer}.weight"])
    scale = torch.rand(144, 1) if rowwise else scale
    tensors |= {f"{layer}.weight": q, f"{layer}.weight_scale": scale}
    name, metadata = "float8_e4m3fn" + ("_rowwise" if rowwise else ""), {}
    if described == "header":
        metadata["_quantization_metadata"] = json.dumps({"layers": {layer: {"format": name}}})
    if described == "nested":
        text = json.dumps({"params": {"format": name}, "full_precision_matrix_mult": True})
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "fp8.safetensors", metadata)
    loaded, expected = official(path=tmp_path / "fp8.safetensors"), q.float() * scale
    for i, letter in enumerate("qkv"):
        rows = expected[48 * i:48 * (i + 1)]
        assert torch.equal(loaded[f"layers.0.attention.to_{letter}.weight"], rows)


@pytest.mark.parametrize("change, words", [
    ({"weight_scale": torch.ones(3, 3)}, "scaled in blocks"),
    ({"comfy_quant": b'{"format": "convrot_w4a4"}'}, "convrot_w4a4"),
    ({"comfy_quant": b'{"format": "int8_tensorwise"'}, "JSON"),
    ({"comfy_quant": b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 7}'},
     "int8_tensorwise"),
    ({"weight_scale": None}, "I8"),
    ({"pre_quant_scale": torch.ones(48)}, "smoothed"),
    ({"comfy_quant": torch.ones(3)}, "JSON"),
    ({"weight_scale": torch.ones(48, 1).byte()}, "scales U8"),
    ({"weight_scale": torch.full((48, 1), torch.nan)}, "to_q.weight_scale is not finite"),
])
def test_quantized_files_that_are_refused(tmp_path, weights, change, words):
    layer = "layers.0.attention.to_q"
    numbers, scale = formats.quantize_rows(weights["dit"][f"{layer}.weight"], torch.int8)
    tensors = {**weights["dit"], f"{layer}.weight": numbers, f"{layer}.weight_scale": scale}
    for key, value in change.items():
        if isinstance(value, bytes):
            value = torch.tensor(list(value), dtype=torch.uint8)  # noqa: PLW2901
        tensors[f"{layer}.{key}"] = value
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "x.safetensors")
    for keep in ({}, {"int8": Bound()}):
        with pytest.raises(UserError, match=words):
            load_dit(tmp_path / "x.safetensors", like=PLACES["dit"], keep=keep)


ROTATED = b'{"format": "int8_tensorwise", "convrot": true}'


@pytest.mark.parametrize("shape, dtype, scale, described", [
    ((48,), torch.float8_e4m3fn, torch.ones(()), None),
    ((48,), torch.float8_e4m3fn, torch.ones(48), None),
    ((), torch.int8, torch.ones(()), ROTATED),
    ((256,), torch.int8, torch.ones(()), ROTATED),
    ((48,), torch.float8_e4m3fn, torch.ones(512).byte(), b'{"format": "mxfp8"}'),
    ((48,), torch.uint8, torch.ones(512).byte(), b'{"format": "nvfp4"}'),
    ((4, 4, 3, 3), torch.float8_e4m3fn, torch.ones(()), None),
    ((32, 64), torch.float8_e4m3fn, torch.ones(128, 4), b'{"format": "mxfp8"}'),
    ((32, 32), torch.uint8, torch.ones(128, 4), b'{"format": "nvfp4"}'),         # scales in float32
    ((0, 48), torch.int8, torch.ones(0, 1).double(), ROTATED),
])
def test_shapes_and_scales_of_quantized_tensors(tmp_path, weights, shape, dtype, scale, described):
    """Two dimensions, and scales of the format's type. One sentence names the tensor."""
    layer = "layers.0.attention.norm_q"
    tensors = {**weights["dit"], f"{layer}.weight": torch.ones(shape).to(dtype),
               f"{layer}.weight_scale": scale}
    if described:
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    if described and b"nvfp4" in described:
        tensors[f"{layer}.weight_scale_2"] = torch.ones(())
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"{layer}.weight is of type|{layer}.weight \\["):
        load_dit(tmp_path / "x.safetensors", like=PLACES["dit"])


@pytest.mark.parametrize("stored", ["BF16", "fp8", "Q8_0"])
def test_damage_of_what_is_computed_is_found(tmp_path, weights, monkeypatch, stored):
    """A large tensor that is mapped is not read; one that is computed is looked at."""
    monkeypatch.setattr(convert_weights, "SMALL", 0)
    name = "layers.0.feed_forward.w2.weight"
    tensors, broken = dict(weights["dit"]), weights["dit"][name].clone()
    broken[0, 0] = torch.nan
    tensors[name] = broken
    if stored == "fp8":
        tensors[name] = broken.to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale")] = torch.ones(())
    if stored == "Q8_0":
        pytest.importorskip("gguf")
        data = bytearray((FORMATS / "gguf/dit_q8_0_sdcpp.gguf").read_bytes())
        tensors, _ = formats.read_header(FORMATS / "gguf/dit_q8_0_sdcpp.gguf")
        place = tensors[f"model.diffusion_model.{name}"].start
        data[place:place + 2] = b"\x00\x7e"                     # the first block's scale: NaN
        (tmp_path / "x").write_bytes(data)
    else:
        save_file(tensors, tmp_path / "x")
    network = convert_weights.open_network("dit", tmp_path / "x", PLACES["dit"])
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UserError, match=f"x: {name} is not finite.*damaged"):
            load_dit(network, dtype=dtype)
    if stored == "BF16":
        assert formats.damaged_weights(load_dit(network, dtype=torch.bfloat16)) == [name]


@pytest.mark.parametrize("number, name", [(9, "Q8_1"), (16, "IQ2_XXS"), (39, "MXFP4"), (99, "99")])
def test_types_of_gguf_that_are_not_read(tmp_path, number, name):
    """The error has the name of the type; for one that is not known, its number."""
    entry = struct.pack("<Q1sIQIQ", 1, b"x", 1, 32, number, 0)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(99))
    with pytest.raises(UserError, match=f"type {name};.*bfloat16"):
        formats.read_header(tmp_path / "x.gguf")


class Bound:
    """Stands for hardware.bind: remembers what it was given."""

    def __init__(self):
        self.layers = []

    def __call__(self, linear, weight, scale, group):
        self.layers.append((linear, weight, scale))
        values = weight.float() * scale
        values = formats.rotate(values, formats.hadamard(group)) if group else values
        linear.weight = torch.nn.Parameter(values, requires_grad=False)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantizing_while_loading_needs_one_tensor_more(kind, monkeypatch):
    """Each layer gets its tensor as it is stored, mapped, while later layers have none yet."""
    empty_network, modules, counts = convert_weights.empty_network, [], []

    def remember(*arguments):
        modules.append(empty_network(*arguments))
        return modules[-1]

    def quantize_layer(linear, weight):
        assert weight.dtype == torch.bfloat16
        weights = [m.weight for m in modules[-1].modules()
                   if isinstance(m, torch.nn.Linear) and m.bias is None]
        counts.append(sum(w.dtype.itemsize == 1 for w in weights))
        assert counts[-1] + sum(w.is_meta for w in weights) == len(weights) == 7 * 7
        hardware.quantize_layer(linear, weight, kind)

    with monkeypatch.context() as patch:
        patch.setattr(convert_weights, "empty_network", remember)
        net = load_dit(PLACES["dit"], quantize_layer=quantize_layer)
    assert counts == [*range(7 * 7)]
    assert_same(net.state_dict(), hardware.quantize(load_dit(PLACES["dit"]), kind).state_dict())


@pytest.mark.parametrize("file, name", [
    ("comfy_quantized/dit_fp8_comfy_quant.safetensors", "fp8"), ("int8", "int8")])
def test_stored_formats_can_be_kept(tmp_path, file, name):
    """The layers of the blocks are bound as they are stored, mapped; an adapter's are merged."""
    path = FORMATS / file
    if file == "int8":
        convert_weights.convert(TINY, tmp_path / "int8", dtype="int8")
        path = tmp_path / "int8"
    bind = Bound()
    kept = load_dit(path, like=PLACES["dit"], keep={name: bind})
    assert len(bind.layers) == 7 * 7                          # 3 + 2 + 2 blocks
    for linear, weight, scale in bind.layers:
        assert weight.shape == (linear.out_features, linear.in_features)
        assert scale.shape == (linear.out_features, 1) and scale.dtype == torch.float32
        assert weight.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[name]
    plain = load_dit(path, like=PLACES["dit"])
    assert relative_error(velocity(kept), velocity(plain)) < 1e-6
    adapter = [(LORA / "lycoris_locon.safetensors", 1.0)]
    merged = Bound()
    net = load_dit(path, like=PLACES["dit"], adapters=adapter, keep={name: merged})
    assert len(merged.layers) == 7 * 7 - 6
    plain = load_dit(path, like=PLACES["dit"], adapters=adapter)
    assert relative_error(velocity(net), velocity(plain)) < 1e-6


def test_a_tensor_that_is_not_aligned(tmp_path):
    """The package aligns headers to 8 bytes; not every writer does."""
    values = torch.arange(6, dtype=torch.float32)
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    text = json.dumps({"x": entry}).encode()
    text += b" " * (1 - len(text) % 2)                        # an odd length
    file = tmp_path / "odd.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
    tensors, _ = formats.read_header(file)
    assert tensors["x"].start % 4 and torch.equal(formats.read(tensors["x"]), values)


@pytest.mark.slow
def test_damaged_files():
    """A sample of tests/tools/fuzz_files.py, which says what is good."""
    errors, loaded, faults = fuzz_files.run(40, seed=0)
    assert not faults
    assert errors > 15 and loaded > 5


def gguf_of(tensors, *values):
    """A GGUF file of tensors with one number each; values: entries of its metadata."""
    entries = [struct.pack("<Q4sIQIQ", 4, b"%04d" % i, 1, 1, 0, 32 * i) for i in range(tensors)]
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + b"".join([*values, *entries])
    return header + bytes(-len(header) % 32 + 32 * tensors)


@pytest.mark.parametrize("tensors", [122, 123, 379])
def test_a_gguf_file_may_have_any_number_of_tensors(tmp_path, tensors):
    """123 is also the code of {, with which the header of a safetensors file begins."""
    (tmp_path / "x.gguf").write_bytes(gguf_of(tensors))
    assert len(formats.read_header(tmp_path / "x.gguf")[0]) == tensors


@pytest.mark.parametrize("value", [struct.pack("<If", 6, 32.0), struct.pack("<II", 4, 0)])
def test_a_strange_alignment_is_damage(tmp_path, value):
    name = b"general.alignment"
    entry = struct.pack("<Q", len(name)) + name + value
    (tmp_path / "x.gguf").write_bytes(gguf_of(1, entry))
    with pytest.raises(UserError, match="damaged: general.alignment"):
        formats.read_header(tmp_path / "x.gguf")


def test_a_part_that_cannot_be_read_is_named(tmp_path):
    """Where a folder lacks a part, the files that were not taken may be why."""
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:200])
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    for path in (tmp_path, tmp_path / "vae.safetensors"):
        with pytest.raises(UserError, match="lacks .*dit.*not taken: .*x.safetensors is not"):
            convert_weights.open_model(path)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(UserError, match="lacks .*dit") as caught:
        convert_weights.open_model(tmp_path)
    assert "not taken" not in str(caught.value)
