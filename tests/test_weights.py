"""Files: the name table at full size, both layouts, round trips, and files gone wrong."""

import json
import lzma
import resource
import shutil
import struct

import pytest
import torch
from conftest import DATA, TINY, refused, run, run_here
from safetensors.torch import load_file, save_file

import convert_weights
import sampler
from convert_weights import UserError, load_dit, load_text_encoder, load_vae
from model import VAE, DiT, DiTConfig, TextEncoder, TextEncoderConfig, VAEConfig

FULL_SIZE = [("transformer", "dit", DiT, DiTConfig()), ("text_encoder", "text_encoder", TextEncoder, TextEncoderConfig()),
             ("vae", "vae", VAE, VAEConfig())]


@pytest.mark.parametrize("component, network, module_type, config", FULL_SIZE)
def test_name_table_at_full_size(component, network, module_type, config):
    """Every official tensor is exactly one piece of ours, the pieces tile our tensors, and both ways is the identity."""
    official = json.loads((DATA / "official_tensors.json").read_text())[component]
    prefix = "model." if network == "text_encoder" else ""
    pieces = convert_weights.build_pieces(network, config)
    assert {prefix + p.official: list(p.shape) for p in pieces} == official["tensors"]
    assert len(pieces) == len(official["tensors"])
    assert sum(torch.Size(p.shape).numel() for p in pieces) == official["parameters"]

    with torch.device("meta"):
        ours = module_type(config).state_dict()
    rows = {}
    for p in pieces:
        assert p.start == rows.get(p.ours, 0)                                # in order, without gap or overlap
        rows[p.ours] = p.start + p.shape[0]
        assert p.needed == (p.ours in ours)
        if p.needed:
            assert p.shape[1:] == ours[p.ours].shape[1:]
    assert {name: rows[name] for name in ours} == {name: t.shape[0] for name, t in ours.items()}


def test_dit_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(DiTConfig()).parameters()) == 6_154_908_736


def test_pad_tokens_start_at_zero():
    dit = DiT(DiTConfig(dim=24, n_heads=1, n_layers=1, n_refiner_layers=1, cap_feat_dim=8, axes_dims=(8, 8, 8)))
    assert not dit.x_pad_token.any() and not dit.cap_pad_token.any()


def all_tensors(directory):
    """{(folder, name): tensor} of every safetensors file below a directory."""
    return {(file.parent.name, name): tensor for file in directory.rglob("*.safetensors") for name, tensor in load_file(file).items()}


def test_round_trip_is_exact(tmp_path):
    """official -> ours -> ours -> official, tensors bit for bit in their stored type, and the same pictures on the way."""
    convert_weights.convert(TINY, tmp_path / "ours")
    assert {f.name for f in (tmp_path / "ours").iterdir()} == {
        "config.json", "dit.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.json"}
    convert_weights.convert(tmp_path / "ours", tmp_path / "again")
    convert_weights.convert(tmp_path / "again", tmp_path / "official", to="official")
    before, after = all_tensors(TINY), all_tensors(tmp_path / "official")
    assert before.keys() == after.keys() and len(before) > 250
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert (tmp_path / "official/tokenizer/tokenizer.json").read_bytes() == (TINY / "tokenizer/tokenizer.json").read_bytes()
    images = [sampler.generate(sampler.load_pipeline(d), "a cat", 64, 64, steps=2, output="tensor")
              for d in (TINY, tmp_path / "ours", tmp_path / "official")]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_convert_dtype(tmp_path):
    result = run("convert_weights.py", TINY, tmp_path / "wide", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    types = {name: {t.dtype for t in load_file(tmp_path / "wide" / f"{name}.safetensors").values()} for name in ("dit", "vae")}
    assert types == {"dit": {torch.float32}, "vae": {torch.float32}}
    convert_weights.convert(tmp_path / "wide", tmp_path / "narrow", dtype=torch.bfloat16)
    for file in ("dit", "text_encoder", "vae"):
        wide, narrow = (load_file(tmp_path / d / f"{file}.safetensors") for d in ("wide", "narrow"))
        assert {t.dtype for t in narrow.values()} == {torch.float32 if file == "vae" else torch.bfloat16}
        assert all(torch.equal(wide[name], narrow[name].float()) for name in wide)   # it was bfloat16 before


def test_load_into_a_dtype():
    for load, folder in ((load_dit, "transformer"), (load_text_encoder, "text_encoder"), (load_vae, "vae")):
        for dtype in (torch.float32, torch.bfloat16):
            module = load(TINY / folder, dtype=dtype)
            assert not module.training and {p.dtype for p in module.parameters()} == {dtype}
            assert all(p.device.type == "cpu" for p in module.parameters())


def test_save_pipeline_and_official_files_of_it(tmp_path):
    """What training writes: no unused layer in the encoder, the settings kept; official files get a last layer of zeros."""
    p = sampler.load_pipeline(TINY)
    for _ in range(2):                                                       # the second time replaces the first
        convert_weights.save_pipeline(tmp_path / "saved", p.dit, p.text_encoder, p.vae, p.tokenizer, shift=2.5,
                                      dtype=torch.float32, steps=3, guidance=1.5, size=64)
    again = sampler.load_pipeline(tmp_path / "saved")
    assert (again.shift, again.steps, again.guidance, again.size) == (2.5, 3, 1.5, 64)
    options = dict(steps=2, guidance=0.0, shift=3.0, height=64, width=64, output="tensor")
    image = sampler.generate(p, "a cat", **options)
    assert torch.equal(image, sampler.generate(again, "a cat", **options))
    convert_weights.convert(tmp_path / "saved", tmp_path / "official", to="official")
    assert torch.equal(image, sampler.generate(sampler.load_pipeline(tmp_path / "official"), "a cat", **options))
    encoder = load_file(tmp_path / "official/text_encoder/model.safetensors")
    assert encoder.keys() == load_file(TINY / "text_encoder/model.safetensors").keys()
    assert not encoder["model.layers.3.mlp.down_proj.weight"].any()


def test_encoder_files_without_prefix_and_with_a_head(checkpoint):
    """Exports differ: names without "model.", the tied head repeated, the unused layer left out."""
    file = checkpoint / "text_encoder/model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("layers.3.", "norm."))}
    save_file({**tensors, "lm_head.weight": tensors["embed_tokens.weight"].clone()}, file)
    a, b = load_text_encoder(checkpoint / "text_encoder"), load_text_encoder(TINY / "text_encoder")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# --- Files gone wrong ---------------------------------------------------------------------------------------


def edit(path, change):
    """Rewrites a JSON file or a safetensors file after change(data) in place."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        data = dict(load_file(path))
        change(data)
        save_file(data, path)


def test_names_and_shapes_are_checked_both_ways(checkpoint):
    def damage(tensors):
        tensors["stranger.weight"] = torch.zeros(2)
        tensors["encoder.conv_in.bias"] = torch.zeros(3)
        del tensors["decoder.conv_out.bias"]
    edit(checkpoint / "vae/diffusion_pytorch_model.safetensors", damage)
    with pytest.raises(UserError) as error:
        load_vae(checkpoint / "vae")
    for part in ("missing: decoder.conv_out.bias", "unexpected: stranger.weight", "wrong shape: encoder.conv_in.bias [3] instead of [8]"):
        assert part in str(error.value)


def test_ours_is_checked_too(tmp_path):
    convert_weights.convert(TINY, tmp_path / "ours")
    edit(tmp_path / "ours/dit.safetensors", lambda t: t.pop("layers.0.attention.qkv.weight"))
    with pytest.raises(UserError, match="missing: layers.0.attention.qkv.weight"):
        load_dit(tmp_path / "ours")


def test_part_of_the_unused_layer_missing(checkpoint):
    edit(checkpoint / "text_encoder/model.safetensors", lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(UserError, match="missing: layers.3.mlp.up_proj.weight"):
        load_text_encoder(checkpoint / "text_encoder")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..\\x.safetensors", "x.bin", 7, ""])
def test_shard_names_cannot_leave_the_directory(checkpoint, shard):
    edit(checkpoint / "transformer" / INDEX, lambda d: d["weight_map"].update(x_pad_token=shard))
    with pytest.raises(UserError, match="index.json names the shard"):
        load_dit(checkpoint / "transformer")


def break_header(data):
    return struct.pack("<Q", 1 << 40) + data[8:]


@pytest.mark.parametrize("network, path, damage, words", [
    ("dit", f"transformer/{INDEX}", lambda b: b"[]", "should hold a JSON object"),
    ("dit", f"transformer/{INDEX}", lambda b: b"{}", "has no weight_map"),
    ("dit", f"transformer/{INDEX}", lambda b: b"\xff\xfe{", "is not valid JSON"),
    ("dit", "transformer/diffusion_pytorch_model-00002-of-00005.safetensors", None, "00002-of-00005.safetensors is missing"),
    ("dit", "transformer/diffusion_pytorch_model-00002-of-00005.safetensors", lambda b: b[:len(b) // 2], "is not a complete safetensors file"),
    ("dit", "transformer/diffusion_pytorch_model-00002-of-00005.safetensors", lambda b: b"", "is not a complete safetensors file"),
    ("dit", "transformer/diffusion_pytorch_model-00002-of-00005.safetensors", break_header, "is not a complete safetensors file"),
    ("dit", "transformer/diffusion_pytorch_model-00002-of-00005.safetensors", lambda b: b"\x80\x04N.", "is not a complete safetensors file"),
    ("dit", "transformer/config.json", None, "cannot read"),
    ("dit", "transformer/config.json", lambda b: b.replace(b"ZImageTransformer2DModel", b"FluxTransformer2DModel"), "_class_name is 'FluxTransformer2DModel'"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"dim": 48', b'"dim": "48"'), "dim should be a positive whole number, not '48'"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"dim": 48', b'"dim": 47'), "sum(axes_dims) * n_heads = dim"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"n_layers": 3', b'"n_layers": true'), "n_layers should be"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"norm_eps": 1e-05', b'"norm_eps": null'), "norm_eps should be a number"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"norm_eps": 1e-05', b'"norm_eps": NaN'), "norm_eps should be a number"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"n_layers": 3', b'"n_layers": 100000'), "more than any network"),
    ("dit", "transformer/config.json", lambda b: b"[" * 200_000, "is not valid JSON"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"n_kv_heads": 3', b'"n_kv_heads": 1'), "n_kv_heads is 1"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"qk_norm": true', b'"qk_norm": false'), "qk_norm is False"),
    ("dit", "transformer/config.json", lambda b: b.replace(b'"n_layers": 3', b'"n_layers": 4'), "missing: layers.3."),
    ("text_encoder", "text_encoder/config.json", lambda b: b.replace(b'"qwen3"', b'"llama"'), "model_type is 'llama'"),
    ("text_encoder", "text_encoder/config.json", lambda b: b.replace(b'"rope_type": "default"', b'"rope_type": "yarn"'), "rope_parameters"),
    ("text_encoder", "text_encoder/config.json", lambda b: b.replace(b'"num_key_value_heads": 2', b'"num_key_value_heads": 3'), "cannot be built"),
    ("vae", "vae/config.json", lambda b: b.replace(b'"AutoencoderKL"', b'"AutoencoderTiny"'), "_class_name is 'AutoencoderTiny'"),
    ("vae", "vae/config.json", lambda b: b.replace(b'"norm_num_groups": 4', b'"norm_num_groups": 3'), "cannot be built"),
    ("vae", "vae/config.json", lambda b: b.replace(b'    16,\n    16', b'    16,\n    -16'), "block_out_channels should be a list"),
])
def test_damaged_components(checkpoint, network, path, damage, words):
    file = checkpoint / path
    before = file.read_bytes()
    file.unlink()
    if damage:
        after = damage(before)
        assert after != before                                               # the damage was done
        file.write_bytes(after)
    assert refused(run_here(sampler.main, "a cat", "--model", checkpoint), words)
    with pytest.raises(UserError):
        convert_weights.load(network, checkpoint / path.split("/")[0])


def test_tensor_in_two_shards(checkpoint):
    shard = checkpoint / "transformer/diffusion_pytorch_model-00005-of-00005.safetensors"
    edit(shard, lambda t: t.update(x_pad_token=torch.zeros(1, 48)))
    with pytest.raises(UserError, match="x_pad_token is in both"):
        load_dit(checkpoint / "transformer")


def test_quantised_files_are_refused(checkpoint):
    shard = checkpoint / "transformer/diffusion_pytorch_model-00005-of-00005.safetensors"
    edit(shard, lambda t: t.update({name: x.to(torch.int8) for name, x in t.items()}))
    with pytest.raises(UserError, match="holds tensors of type I8"):
        load_dit(checkpoint / "transformer")


@pytest.mark.parametrize("damage, words", [
    (lambda d: shutil.rmtree(d / "transformer"), "is not a model directory"),
    (lambda d: (d / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}'), "has no _class_name"),
    (lambda d: edit(d / "scheduler/scheduler_config.json", lambda c: c.update(shift="3")), "shift should be a number, not '3'"),
    (lambda d: edit(d / "scheduler/scheduler_config.json", lambda c: c.update(shift=10 ** 400)), "shift should be a number"),
    (lambda d: edit(d / "scheduler/scheduler_config.json", lambda c: c.pop("shift")), "shift should be a number, not None"),
    (lambda d: edit(d / "scheduler/scheduler_config.json", lambda c: c.update(use_dynamic_shifting=True)), "use_dynamic_shifting is True"),
    (lambda d: (d / "tokenizer/tokenizer.json").write_text("{}"), "is not a tokenizer file"),
    (lambda d: (d / "tokenizer/tokenizer.json").unlink(), "tokenizer.json is missing"),
])
def test_damaged_checkpoints(checkpoint, damage, words):
    damage(checkpoint)
    assert refused(run_here(sampler.main, "a cat", "--model", checkpoint), words)
    assert refused(run_here(convert_weights.main, checkpoint, checkpoint.parent / "new"), words)


# --- The command line ---------------------------------------------------------------------------------------


def test_convert_command(checkpoint, tmp_path):
    assert run("convert_weights.py", checkpoint, tmp_path / "ours").returncode == 0
    before = sorted(tmp_path.rglob("*"))
    assert refused(run("convert_weights.py", checkpoint, tmp_path / "ours"), "exists already")
    assert refused(run("convert_weights.py", tmp_path / "nowhere", tmp_path / "new"), "is not a model directory")
    edit(checkpoint / "transformer" / INDEX, lambda d: d["weight_map"].update(x_pad_token="../x.safetensors"))
    assert refused(run("convert_weights.py", checkpoint, tmp_path / "new"), "../x.safetensors")
    assert sorted(tmp_path.rglob("*")) == before                             # nothing half-written is left


def test_disk_full_leaves_nothing(tmp_path):
    """A file larger than the process may write stands in for the full disk: the write fails halfway."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    assert refused(run("convert_weights.py", TINY, tmp_path / "new", preexec_fn=limit), "cannot write", "new", "File too large")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert refused(run("convert_weights.py", TINY, tmp_path / "empty", preexec_fn=limit), "cannot write")
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_saving_replaces_all_or_nothing(tmp_path, monkeypatch):
    p = sampler.load_pipeline(TINY)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/notes.txt").write_text("mine")
    save = lambda shift: convert_weights.save_pipeline(tmp_path / "saved", p.dit, p.text_encoder, p.vae, p.tokenizer, shift)
    save(2.0)
    before = {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()}
    assert before.keys() == {"notes.txt", "config.json", "dit.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.json"}
    monkeypatch.setattr(convert_weights, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save(4.0)
    assert {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir()} == before


def test_mixed_types_in_one_of_our_tensors(checkpoint, tmp_path):
    """q in float32 beside k and v in bfloat16: the stack of the three takes the wider type, and nothing is rounded."""
    name = "layers.0.attention.to_q.weight"
    shard = checkpoint / "transformer/diffusion_pytorch_model-00003-of-00005.safetensors"
    wide = torch.randn(48, 48)
    edit(shard, lambda t: t.update({name: wide}))
    convert_weights.convert(checkpoint, tmp_path / "ours")
    qkv = load_file(tmp_path / "ours/dit.safetensors")["layers.0.attention.qkv.weight"]
    assert qkv.dtype == torch.float32 and torch.equal(qkv[:48], wide)


def test_tokenizer_that_does_not_belong(checkpoint):
    (checkpoint / "tokenizer/tokenizer.json").write_bytes(lzma.decompress((DATA / "qwen3_tokenizer.json.xz").read_bytes()))
    assert refused(run_here(sampler.main, "a cat", "--model", checkpoint), "more tokens than the text encoder")


@pytest.mark.parametrize("dit, vae, words", [
    ({"cap_feat_dim": 8}, {}, "text features of another width"),
    ({}, {"latent_channels": 8}, "different latent channels"),
    ({"axes_lens": (16, 64, 64)}, {}, "no room for 512 text tokens"),
])
def test_networks_that_do_not_belong_together(tmp_path, dit, vae, words):
    p = sampler.load_pipeline(TINY)
    other_dit = DiT(DiTConfig(**{**dict(dim=8, n_layers=1, n_refiner_layers=1, n_heads=1, cap_feat_dim=32, axes_dims=(4, 2, 2)), **dit}))
    other_vae = VAE(VAEConfig(**{**dict(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1), **vae}))
    convert_weights.save_pipeline(tmp_path / "mixed", other_dit, p.text_encoder, other_vae, p.tokenizer, 3.0)
    assert refused(run_here(sampler.main, "a cat", "--model", tmp_path / "mixed"), "do not belong together", words)


def test_check_command(tmp_path, monkeypatch):
    result = run("convert_weights.py", "--check", TINY)
    assert refused(result, "16 of 16 files", "transformer/config.json (wrong)", "text_encoder/model-00001-of-00003.safetensors (missing)")
    assert len([line for line in result.stdout.splitlines() if line.split()[0] in ("wrong", "missing")]) == 16
    assert refused(run("convert_weights.py", "--check", tmp_path / "nowhere"), "is not a directory")
    # The real list, checked on the one file of the release that is here.
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(lzma.decompress((DATA / "qwen3_tokenizer.json.xz").read_bytes()))
    assert dict(convert_weights.check_release(tmp_path))["tokenizer/tokenizer.json"] == "ok"
    monkeypatch.setattr(convert_weights, "OFFICIAL_MD5", {"tokenizer/tokenizer.json": convert_weights.OFFICIAL_MD5["tokenizer/tokenizer.json"]})
    assert convert_weights.check_release(tmp_path) == [("tokenizer/tokenizer.json", "ok")]
