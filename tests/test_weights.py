"""Names at full size, layouts, round trips, mapping, configurations, files gone wrong."""

import functools
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import convert_weights
import files
import formats
import hardware
import sampler
from conftest import DATA, ROOT, TINY, refused, run, run_here
from convert_weights import UserError, load_dit, load_text_encoder, load_vae
from model import VAE, DiT, DiTConfig, TextEncoderConfig, VAEConfig

FULL_SIZE = [("transformer", "dit", DiTConfig()), ("vae", "vae", VAEConfig()),
             ("text_encoder", "text_encoder", TextEncoderConfig())]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
SHARD = "transformer/diffusion_pytorch_model-0000{}-of-00005.safetensors"


def edit(path, change):
    """Rewrites a JSON or safetensors file after change(data). A dict instead is merged into it."""
    is_json = path.suffix == ".json"
    data = json.loads(path.read_text(encoding="utf-8")) if is_json else dict(load_file(path))
    if isinstance(change, dict):
        data.update(change)
    else:
        change(data)
    if is_json:
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        save_file({name: tensor.clone() for name, tensor in data.items()}, f"{path}.new")
        os.replace(f"{path}.new", path)


def all_tensors(directory):
    """{(folder, name): tensor} of every safetensors file below a directory."""
    return {(file.parent.name, name): tensor for file in directory.rglob("*.safetensors")
            for name, tensor in load_file(file).items()}


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("component, kind, config", FULL_SIZE)
def test_names_at_full_size(component, kind, config):
    """Every official tensor is one tensor of ours and the other way round, in the same shape."""
    official = json.loads((DATA / "official_tensors.json").read_text())[component]
    expected = convert_weights.expected_tensors(kind, config)
    shapes = {name: list(shape) for name, (_, shape, _) in expected.items()}
    assert shapes == official["tensors"]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == official["parameters"]
    ours = {name: shape for name, shape, needed in expected.values() if needed}
    state = convert_weights.empty_network(kind, config).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len({name for name, _, _ in expected.values()}) == len(expected)


@pytest.mark.parametrize("component, kind, config", FULL_SIZE)
def test_other_programs_names_are_unambiguous(component, kind, config):
    """Only q, k and v of the DiT share a name, each with a place of its own."""
    names = {}
    for official, (ours, _, _) in convert_weights.expected_tensors(kind, config).items():
        for spelling in set(convert_weights.spellings(kind, config, official, ours)):
            names.setdefault(spelling, []).append(official)
    assert all(len(officials) == 1 for officials in names.values())
    comfy = {convert_weights.comfy_name(kind, config, official)
             for official in convert_weights.expected_tensors(kind, config)}
    assert len(comfy) == {"dit": 453, "text_encoder": 398, "vae": 244}[kind]


def test_dit_parameter_count():
    dit = convert_weights.empty_network("dit", DiTConfig())
    assert sum(p.numel() for p in dit.parameters()) == 6_154_908_736


@pytest.mark.slow
def test_empty_networks_are_not_initialized():
    """On the meta device nn.Embedding would import PyTorch's compiler, which takes a second."""
    code = ("import sys, convert_weights as c; from model import TextEncoderConfig;"
            "c.empty_network('text_encoder', TextEncoderConfig());"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DATA.parent.parent)


# --- Load and convert ---------------------------------------------------------------------------


@pytest.mark.parametrize("load, folder", [
    (load_dit, "transformer"), (load_text_encoder, "text_encoder"), (load_vae, "vae")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_into_a_dtype(load, folder, dtype):
    module = load(TINY / folder, dtype=dtype)
    assert not module.training
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(p.device.type == "cpu" for p in module.parameters())


def mapped_bytes(tensors):
    """How many bytes of these tensors lie in mapped files. Linux says what lies where."""
    areas = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            place, *_, path = line.split(maxsplit=5)
            if path.strip().endswith(".safetensors"):
                areas.append([int(number, 16) for number in place.split("-")])
    return sum(tensor.nbytes for tensor in tensors
               if any(start <= tensor.data_ptr() < end for start, end in areas))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_not_cast_is_mapped(tmp_path):
    """Such a network has no memory of its own, one that is cast has nothing mapped."""
    convert_weights.convert(TINY, tmp_path / "comfy", to="comfy")
    for path in (TINY / "transformer", tmp_path / "comfy/z_image.safetensors"):
        parameters = list(load_dit(path, dtype=None, like=TINY / "transformer").parameters())
        assert {p.dtype for p in parameters} == {torch.bfloat16}
        assert mapped_bytes(parameters) == sum(p.nbytes for p in parameters)
    assert mapped_bytes(load_dit(TINY / "transformer", dtype=torch.float32).parameters()) == 0


def test_a_mapped_network_survives_a_replaced_file(checkpoint):
    """Writing to the network does not reach the file; a new file does not reach the network."""
    file = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    vae, before = load_vae(checkpoint / "vae"), file.read_bytes()
    with torch.no_grad():
        vae.decoder.conv_in.weight.zero_()
    assert file.read_bytes() == before
    kept = vae.encoder.conv_in.weight.clone()
    edit(file, {"encoder.conv_in.weight": torch.zeros_like(kept)})
    assert torch.equal(vae.encoder.conv_in.weight, kept)


def test_round_trip_is_exact(tmp_path):
    """official -> ours -> comfy -> ours -> official: all tensors bit for bit in their type."""
    steps = [("ours", TINY), ("comfy", "ours"), ("again", "comfy"), ("official", "again")]
    for name, source in steps:
        layout = name if name in ("comfy", "official") else "ours"
        convert_weights.convert(tmp_path / source, tmp_path / name, to=layout)
    assert {f.name for f in (tmp_path / "ours").iterdir()} == {
        "config.json", "dit.safetensors", "text_encoder.safetensors", "vae.safetensors",
        "tokenizer.json"}
    before, after = all_tensors(TINY), all_tensors(tmp_path / "official")
    assert before.keys() == after.keys() and len(before) > 250
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    options = {"height": 64, "width": 64, "steps": 2, "output": "tensor"}
    images = [sampler.generate(sampler.load_pipeline(path), "a cat", **options)
              for path in (TINY, *(tmp_path / name for name, _ in steps))]
    assert all(torch.equal(images[0], image) for image in images)


def test_what_a_student_knows_goes_everywhere(tmp_path):
    """Steps, size, guidance and trained steps survive every layout, and come back bit-equal."""
    p = sampler.load_pipeline(TINY)
    for _ in range(2):                            # the second time replaces the first
        convert_weights.save_pipeline(
            tmp_path / "ours", p.dit, p.text_encoder, p.vae, p.tokenizer, shift=2.5,
            dtype=torch.bfloat16, steps=3, guidance=1.5, size=64, trained_steps=3)
    settings = {"shift": 2.5, "steps": 3, "guidance": 1.5, "size": 64, "trained_steps": 3}
    for layout in ("official", "comfy"):
        convert_weights.convert(tmp_path / "ours", tmp_path / layout, to=layout)
        checkpoint = convert_weights.open_model(tmp_path / layout)
        assert checkpoint.settings == settings and not checkpoint.shift_assumed
        convert_weights.convert(tmp_path / layout, tmp_path / f"{layout} back")
        before, after = (load_file(tmp_path / name / "dit.safetensors")
                         for name in ("ours", f"{layout} back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    encoder = load_file(tmp_path / "official/text_encoder/model.safetensors")
    assert encoder.keys() == load_file(TINY / "text_encoder/model.safetensors").keys()
    assert not encoder["model.layers.3.mlp.down_proj.weight"].any()      # the layer nobody runs


def test_convert_dtype(tmp_path):
    convert_weights.convert(TINY, tmp_path / "wide", dtype=torch.float32)
    convert_weights.convert(tmp_path / "wide", tmp_path / "narrow", dtype=torch.bfloat16)
    for kind in ("dit", "text_encoder", "vae"):
        wide, narrow = (load_file(tmp_path / name / f"{kind}.safetensors")
                        for name in ("wide", "narrow"))
        assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
        assert {tensor.dtype for tensor in narrow.values()} == {
            torch.float32 if kind == "vae" else torch.bfloat16}
        assert all(torch.equal(wide[name], narrow[name].float()) for name in wide)


@pytest.mark.parametrize("layout", ["ours", "comfy"])
def test_convert_to_int8(tmp_path, layout):
    """What is stored is what quantizing a loaded network gives, rotated; the rest is kept."""
    convert_weights.convert(TINY, tmp_path / "int8", dtype="int8", to=layout)
    network = convert_weights.open_model(tmp_path / "int8").networks["dit"]
    before = load_dit(TINY / "transformer", dtype=None)
    after = load_dit(network, dtype=None, keep={"int8": hardware.bind})
    hardware.quantize(before, "int8")
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sum(tensor.dtype == torch.int8 for tensor in after.values()) == 7 * 7
    assert {piece.stored.group for piece in network.pieces.values()} == {0, 16, 64}
    plain = dict(convert_weights.official_tensors(
        convert_weights.open_network("dit", TINY / "transformer")))
    for name, tensor in convert_weights.official_tensors(network):
        error = (tensor.float() - plain[name].float()).norm() / plain[name].float().norm()
        assert error < (0.02 if convert_weights.QUANTIZED.search(name) else 1e-9), name


def test_mixed_types_in_a_stack(checkpoint, tmp_path):
    """q in float32 beside k and v in bfloat16: the stack takes the wider type, nothing is lost."""
    name, wide = "layers.0.attention.to_q.weight", torch.randn(48, 48)
    edit(checkpoint / SHARD.format(3), {name: wide})
    convert_weights.convert(checkpoint, tmp_path / "comfy", to="comfy")
    stack = load_file(tmp_path / "comfy/z_image.safetensors")["layers.0.attention.qkv.weight"]
    assert stack.dtype == torch.float32 and torch.equal(stack[:48], wide)


@pytest.mark.slow
def test_adapters_on_conversion(tmp_path):
    file = DATA / "formats/lora/aitoolkit_lora_a_b.safetensors"
    result = run("convert_weights.py", TINY, tmp_path / "merged", "--lora", f"{file}:0.5",
                 "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    merged = load_dit(tmp_path / "merged").state_dict()
    expected = load_dit(TINY / "transformer", adapters=[(file, 0.5)]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_encoder_files_without_prefix_and_with_a_head(checkpoint):
    """Exports differ: names without "model.", the tied head repeated, the unused layer left out."""
    def reduce(tensors):
        for name, tensor in list(tensors.items()):
            del tensors[name]
            if not name.startswith(("model.layers.3.", "model.norm.")):
                tensors[name.removeprefix("model.")] = tensor
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    edit(checkpoint / "text_encoder/model.safetensors", reduce)
    state = load_text_encoder(checkpoint / "text_encoder").state_dict()
    for name, tensor in load_text_encoder(TINY / "text_encoder").state_dict().items():
        assert torch.equal(tensor, state[name])


# --- Parts from several places ------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The tiny checkpoint in single files, as a student leaves: with its settings."""
    target = tmp_path_factory.mktemp("parts") / "comfy"
    convert_weights.convert(TINY, target, to="comfy")
    return target


def test_parts_replace_those_of_the_model(comfy):
    checkpoint = convert_weights.open_model(
        TINY, dit=comfy / "z_image.safetensors", vae=comfy / "ae.safetensors")
    assert checkpoint.networks["dit"].path == comfy / "z_image.safetensors"
    assert checkpoint.networks["text_encoder"].path == TINY / "text_encoder"
    assert checkpoint.settings["shift"] == 3.0 and not checkpoint.shift_assumed


def test_settings_are_those_of_the_dit(comfy, tmp_path):
    own = tmp_path / "own"
    convert_weights.convert(TINY, own)
    config = json.loads((own / "config.json").read_text()) | {"steps": 3, "shift": 5.0}
    (own / "config.json").write_text(json.dumps(config))
    for model in (TINY, comfy):
        settings = convert_weights.open_model(model, dit=own).settings
        assert (settings["steps"], settings["shift"]) == (3, 5.0)
    official, student = tmp_path / "official", tmp_path / "student"
    convert_weights.convert(own, official, to="official")
    convert_weights.convert(TINY, student)
    for dit in (official / "transformer", own / "dit.safetensors",
                official / "transformer" / "diffusion_pytorch_model.safetensors"):
        assert convert_weights.open_model(student, dit=dit).settings["shift"] == 5.0
    single = comfy / "z_image.safetensors"
    assert convert_weights.open_model(own, dit=single).settings["shift"] == 3.0
    with pytest.raises(UserError, match=f"give --model {own}"):
        convert_weights.open_model(own / "dit.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_a_folder_whose_name_is_not_utf8(tmp_path):
    for number, layout in enumerate(("ours", "comfy", "official")):
        place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xe9" + b"%d" % number))
        convert_weights.convert(TINY, place, to=layout)
        assert sampler.load_pipeline(place).shift == 3.0


def test_a_single_file_finds_what_lies_beside_it(comfy, tmp_path):
    checkpoint = convert_weights.open_model(comfy / "z_image.safetensors")
    assert checkpoint.files["vae"] == comfy / "ae.safetensors"
    assert convert_weights.open_model(comfy).files == checkpoint.files
    alone = shutil.copy(comfy / "z_image.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError) as error:
        convert_weights.open_model(alone)
    for words in ("lacks text_encoder, vae, tokenizer",
                  "add --text-encoder qwen_3_4b.safetensors --vae ae.safetensors --tokenizer "
                  "tokenizer.json, or put these beside the file of --model",
                  f"--model Tongyi-MAI/Z-Image-Turbo --dit {alone}"):
        assert words in str(error.value)
    with pytest.raises(UserError) as error:
        convert_weights.open_model(vae=TINY / "vae")
    assert f"--vae {TINY / 'vae'}" in str(error.value) and "None" not in str(error.value)
    assert "--dit z_image_turbo_bf16.safetensors" in str(error.value)
    checkpoint = convert_weights.open_model(
        alone, text_encoder=TINY / "text_encoder", vae=TINY / "vae", tokenizer=TINY / "tokenizer")
    assert checkpoint.networks["vae"].path == TINY / "vae"
    twice = shutil.copytree(comfy, tmp_path / "twice")
    shutil.copy(twice / "ae.safetensors", twice / "another.safetensors")
    with pytest.raises(UserError, match="several files for the vae.*ae.safetensors"):
        convert_weights.open_model(twice)
    assert convert_weights.open_model(twice, vae=twice / "ae.safetensors")


def test_an_assumed_shift_is_said(comfy, tmp_path):
    """No file of other programs has the schedule's shift, nor has a component folder alone."""
    alone = shutil.copytree(TINY / "transformer", tmp_path / "transformer")
    named = {"dit": alone, "text_encoder": TINY / "text_encoder",
             "vae": comfy / "ae.safetensors", "tokenizer": TINY / "tokenizer"}
    checkpoint = convert_weights.open_model(**named)
    assert checkpoint.shift_assumed and checkpoint.settings == {"shift": 3.0}
    checkpoint = convert_weights.open_model(**{**named, "dit": comfy / "z_image.safetensors"})
    assert not checkpoint.shift_assumed           # we write it into the header


@pytest.mark.parametrize("to", ["ours", "official"])
def test_an_assumed_shift_that_is_written_is_said(comfy, tmp_path, to):
    """In the new place it looks like any other shift, so this is the last occasion to say it."""
    alone = shutil.copytree(TINY / "transformer", tmp_path / "transformer")
    words = ["--dit", alone, "--text-encoder", TINY / "text_encoder"]
    result = run_here(convert_weights.main, comfy / "ae.safetensors", tmp_path / "new", *words,
                      "--to", to)
    assert result.returncode == 0
    assert result.stderr.count("warning: ") == 1 and "shift" in result.stderr
    assert ".py" not in result.stderr
    result = run_here(convert_weights.main, TINY, tmp_path / "other", "--to", to)
    assert result.returncode == 0 and "shift" not in result.stderr


def test_a_configuration_holds_where_the_weights_were_not_fetched(checkpoint, tmp_path):
    """Of a model on the hub, parts that are named are not downloaded; their config.json is."""
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae = TINY / "vae/diffusion_pytorch_model.safetensors"
    model = convert_weights.open_model(checkpoint, vae=vae)
    assert model.networks["vae"].config == convert_weights.open_model(TINY).networks["vae"].config
    convert_weights.convert(TINY, tmp_path / "ours")
    dit = shutil.move(tmp_path / "ours" / "dit.safetensors", tmp_path / "dit.safetensors")
    model = convert_weights.open_model(tmp_path / "ours", dit=dit)
    assert model.networks["dit"].config == convert_weights.open_model(TINY).networks["dit"].config
    assert not model.shift_assumed
    with pytest.raises(UserError, match="dit.safetensors"):
        convert_weights.open_model(tmp_path / "ours")


@pytest.mark.parametrize("value, dtype, words", [
    (1e5, "float16", ["too large", "--dtype"]), (float("nan"), "int8", ["damaged"]),
    (float("nan"), "float32", ["damaged"])])
def test_numbers_that_are_not_finite_are_not_written(checkpoint, tmp_path, value, dtype, words):
    def damage(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    edit(checkpoint / "text_encoder/model.safetensors", damage)
    result = run_here(convert_weights.main, checkpoint, tmp_path / "new", "--dtype", dtype)
    assert refused(result, "layers.0.mlp.up_proj.weight", *words)
    assert not (tmp_path / "new").exists()


def test_a_quantized_network_is_not_saved_as_a_plain_one(tmp_path):
    p = sampler.load_pipeline(TINY)
    parts = sampler.quantize(p.dit, "int8"), p.text_encoder, p.vae, p.tokenizer, 3.0
    for dtype in (None, torch.bfloat16):
        with pytest.raises(UserError, match="the dit is quantized"):
            convert_weights.save_pipeline(tmp_path / "saved", *parts, dtype=dtype)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("text, expected", [
    ("a.safetensors", ("a.safetensors", 1.0)),
    ("a.safetensors:0.5", ("a.safetensors", 0.5)),
    ("dir/a:-1", ("dir/a", -1.0)),
    (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
    (r"C:\loras\a.safetensors:0.8", (r"C:\loras\a.safetensors", 0.8)),
])
def test_strength_of_an_adapter(text, expected):
    assert convert_weights.adapter(text) == expected


# --- Configurations: every key of every file ----------------------------------------------------

# file -> {key: what happens when it is changed}. used: another network or picture; refused: an
# error names it; ignored: it says nothing about a picture. A misspelt key is warned about.
KEYS = {
    "transformer/config.json": {
        "used": "in_channels dim n_layers n_refiner_layers n_heads norm_eps cap_feat_dim "
                "rope_theta axes_dims axes_lens t_scale",
        "refused": "_class_name all_patch_size all_f_patch_size n_kv_heads qk_norm siglip_feat_dim",
        "ignored": "_diffusers_version"},
    "text_encoder/config.json": {
        "used": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "num_key_value_heads head_dim rms_norm_eps rope_parameters",
        "refused": "model_type hidden_act attention_bias use_sliding_window layer_types",
        "ignored": "architectures attention_dropout bos_token_id dtype eos_token_id "
                   "initializer_range max_position_embeddings max_window_layers pad_token_id "
                   "sliding_window tie_word_embeddings transformers_version use_cache"},
    "vae/config.json": {
        "used": "in_channels latent_channels block_out_channels layers_per_block norm_num_groups "
                "scaling_factor shift_factor",
        "refused": "_class_name act_fn mid_block_add_attention use_quant_conv use_post_quant_conv "
                   "latents_mean latents_std out_channels down_block_types up_block_types",
        "ignored": "_diffusers_version force_upcast sample_size"},
    "scheduler/scheduler_config.json": {
        "used": "shift",
        "refused": "_class_name num_train_timesteps use_dynamic_shifting use_karras_sigmas "
                   "use_exponential_sigmas use_beta_sigmas invert_sigmas shift_terminal "
                   "stochastic_sampling",
        "ignored": "_diffusers_version base_image_seq_len base_shift max_image_seq_len max_shift "
                   "time_shift_type"},
    "tokenizer/tokenizer_config.json": {
        "used": "",
        "refused": "add_prefix_space split_special_tokens extra_special_tokens",
        "ignored": "backend bos_token clean_up_tokenization_spaces eos_token errors "
                   "is_local local_files_only model_max_length pad_token tokenizer_class "
                   "unk_token"},
    "text_encoder/generation_config.json": {      # of language models that write; not read
        "used": "", "refused": "",
        "ignored": "_from_model_config output_attentions output_hidden_states transformers_version "
                   "use_cache"},
    "model_index.json": {
        "used": "",
        "refused": "_class_name scheduler text_encoder tokenizer transformer vae",
        "ignored": "_diffusers_version"},
}
# What our own config.json says beside its three sections.
OUR_SETTINGS = {"shift": 2.5, "steps": 3, "guidance": 1.5, "size": 64, "trained_steps": 3}
FATES = [(file, key, fate) for file, fates in KEYS.items() for fate, keys in fates.items()
         for key in keys.split()]


@pytest.mark.parametrize("file", KEYS)
def test_the_table_has_every_key(file):
    known = {key for name, key, _ in FATES if name == file}
    assert known == json.loads((TINY / file).read_text()).keys()


def other(value):
    """A value of the same kind that says something else."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, list):
        return [other(item) for item in value]
    if isinstance(value, dict):
        return {**value, "rope_theta": 12345.0}
    return f"other {value}" if isinstance(value, str) else value * 2 + 2


@functools.cache
def open_tiny():
    return convert_weights.open_model(TINY)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file, key, fate", FATES)
def test_keys_of_configurations(checkpoint, file, key, fate):
    before = open_tiny()
    edit(checkpoint / file, lambda data: data.update({key: other(data[key])}))
    try:
        after = convert_weights.open_model(checkpoint)
    except UserError as error:
        assert fate in ("refused", "used"), error
        return
    same = before.settings == after.settings and all(
        before.networks[kind].config == after.networks[kind].config for kind in before.networks)
    assert same == (fate == "ignored")


@pytest.mark.parametrize("file", [file for file in KEYS if "generation" not in file])
def test_unknown_keys_are_warned_about(checkpoint, file):
    edit(checkpoint / file, {"sclaing_factor": 2})
    with pytest.warns(UserWarning, match=f"{file}: sclaing_factor"):
        convert_weights.open_model(checkpoint)


@pytest.mark.parametrize("key", [*OUR_SETTINGS, "setps"])
def test_settings_of_our_own_configuration(tmp_path, key):
    """Each of them is used; another one is refused, as is a value of another kind."""
    assert formats.SETTINGS.keys() == OUR_SETTINGS.keys()
    convert_weights.convert(TINY, tmp_path / "ours")
    edit(tmp_path / "ours/config.json", OUR_SETTINGS)
    edit(tmp_path / "ours/config.json", {key: other(OUR_SETTINGS.get(key, 1))})
    if key in OUR_SETTINGS:
        settings = convert_weights.open_model(tmp_path / "ours").settings
        assert settings == {**OUR_SETTINGS, key: other(OUR_SETTINGS[key])}
        edit(tmp_path / "ours/config.json", {key: "3"})
    with pytest.raises(UserError, match=key):
        convert_weights.open_model(tmp_path / "ours")


@pytest.mark.parametrize("name", ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"])
def test_other_pipelines_with_the_same_networks(checkpoint, name):
    edit(checkpoint / "model_index.json", {"_class_name": name})
    assert convert_weights.open_model(checkpoint)


@pytest.mark.parametrize("part, value, good", [
    ("scheduler", ["diffusers", "UniPCMultistepScheduler"], False),
    ("text_encoder", ["transformers", "Qwen3VLModel"], False),
    ("text_encoder", ["transformers", "Qwen3Model"], True),
    ("vae", ["diffusers", "AutoencoderKLWan"], False), ("vae", "AutoencoderKL", False),
    ("tokenizer", ["transformers", "Qwen2TokenizerFast"], True),
    ("transformer", [None, None], False), ("vae", [], False), ("vae", [["AutoencoderKL"]], False)])
def test_the_classes_of_a_pipeline(checkpoint, part, value, good):
    edit(checkpoint / "model_index.json", {part: value})
    if good:
        assert convert_weights.open_model(checkpoint)
    else:
        with pytest.raises(UserError, match=f"model_index.json: {part} is"):
            convert_weights.open_model(checkpoint)


def test_a_key_that_comes_twice(tmp_path):
    """Programs differ in which one they take."""
    convert_weights.convert(TINY, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "steps": 4, "steps": 8}')
    with pytest.raises(UserError, match="twice: steps"):
        convert_weights.open_model(tmp_path / "ours")


@pytest.mark.parametrize("key, value", [
    ("steps", 50_000), ("guidance", 2e3), ("shift", 1e4), ("size", 10 ** 6),
    ("trained_steps", [1, 50_000])])
def test_settings_have_the_limits_of_the_options(tmp_path, key, value):
    convert_weights.convert(TINY, tmp_path / "ours")
    edit(tmp_path / "ours" / "config.json", {key: value})
    with pytest.raises(UserError, match=f"{key} is"):
        convert_weights.open_model(tmp_path / "ours")


def test_a_shift_in_two_files(checkpoint):
    (checkpoint / "sampling.json").write_text('{"steps": 4, "shift": 9.0}')
    with pytest.raises(UserError, match="sampling.json: the shift"):
        convert_weights.open_model(checkpoint)


def test_weights_of_the_usual_name_come_before_others(checkpoint):
    """As in diffusers. Two files of other names are no choice that can be guessed."""
    vae = checkpoint / "vae"
    usual = vae / "diffusion_pytorch_model.safetensors"
    shutil.copy(usual, vae / "a.safetensors")
    assert formats.shard_files(vae) == [usual]
    names = ["vae/a.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert names[1] in formats.wanted_weights(checkpoint, names, {"dit", "text_encoder"})
    shutil.move(usual, vae / "b.safetensors")
    with pytest.raises(UserError, match="several.*a.safetensors, b.safetensors"):
        formats.shard_files(vae)
    (vae / "b.safetensors").unlink()
    assert formats.shard_files(vae) == [vae / "a.safetensors"]


@pytest.mark.parametrize("rope, good", [
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, False),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, False),
    ({"rope_parameters": {"rope_type": "dynamic"}}, False),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, False),
    ({"rope_scaling": [1]}, False),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}}, False),
    ({"rope_parameters": {"rope_theta": 5.0, "factor": 2.0}}, False),
    ({"rope_scaling": {"type": "default"}, "rope_theta": 5.0}, True),
    ({"rope_scaling": None, "rope_parameters": None, "rope_theta": 5.0}, True),
    ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, True),
])
def test_spellings_of_the_rotary_embedding(checkpoint, rope, good):
    edit(checkpoint / "text_encoder/config.json", rope)
    if good:
        network = convert_weights.open_network("text_encoder", checkpoint / "text_encoder")
        assert network.config.rope_theta == 5.0
    else:
        with pytest.raises(UserError, match="rotary"):
            convert_weights.open_network("text_encoder", checkpoint / "text_encoder")


def test_a_missing_field_is_what_the_reference_takes(checkpoint):
    """Not the release's value: diffusers' AutoencoderKL scales by 0.18215 unless told otherwise."""
    edit(checkpoint / "vae/config.json", lambda data: data.pop("scaling_factor"))
    network = convert_weights.open_network("vae", checkpoint / "vae")
    assert network.config.scaling_factor == 0.18215


@pytest.mark.parametrize("change, words", [
    (lambda c: c["vae"].update(scaling_factr=c["vae"].pop("scaling_factor")), "scaling_factr"),
    (lambda c: c.update(setps=4), "setps"),
    (lambda c: c["dit"].pop("t_scale"), "t_scale"),
    (lambda c: c.pop("vae"), "section vae"),
    (lambda c: c.pop("shift"), "shift"),
    (lambda c: c.update(steps=0), "steps"),
    (lambda c: c.update(guidance=float("nan")), "guidance"),
])
def test_our_own_configuration_is_exact(tmp_path, change, words):
    """Every field is written, so one that is missing or unknown is a mistake."""
    convert_weights.convert(TINY, tmp_path / "ours")
    edit(tmp_path / "ours/config.json", change)
    with pytest.raises(UserError, match=f"config.json.*{words}"):
        convert_weights.open_model(tmp_path / "ours")


# --- Tokenizers ---------------------------------------------------------------------------------


def test_what_a_tokenizer_remembers_is_not_the_models(checkpoint, tmp_path):
    """diffusers saves padding and truncation of the last call with it."""
    file, prompt = checkpoint / "tokenizer/tokenizer.json", "a cat with an umbrella " * 4
    tokenizer = Tokenizer.from_file(str(file))
    ids = tokenizer.encode(prompt).ids
    for direction in ("left", "right"):
        tokenizer.enable_padding(direction=direction, length=512, pad_id=465)
        tokenizer.enable_truncation(20, direction=direction)
        tokenizer.save(str(file))
        assert formats.load_tokenizer(file).encode(prompt).ids == ids
    convert_weights.convert(checkpoint, tmp_path / "ours")
    assert Tokenizer.from_file(str(tmp_path / "ours/tokenizer.json")).encode(prompt).ids == ids


def adding(token):
    """A post_processor that puts a token before each text."""
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [first, piece], "pair": [first, piece, piece],
            "special_tokens": {token: {"id": token, "ids": [1], "tokens": [token]}}}


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update(added_tokens=[x for x in t["added_tokens"]
                                      if x["content"] != "<|im_end|>"]), "im_end"),
    (lambda t: t["model"]["vocab"].update({"unseen": 511}), None),
    (lambda t: t["model"]["vocab"].update({"unseen": 512}), "token 512"),
    (lambda t: t["model"].update(dropout=0.1), "dropout"),
    (lambda t: t.pop("model"), "not a tokenizer"),
    (lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "tokenizer.json"),
    (lambda t: t["model"].update(continuing_subword_prefix="x"), "continuing_subword_prefix"),
    (lambda t: t.update(model={"type": "WordLevel", "vocab": {"<|im_start|>": 0, "<|im_end|>": 1},
                               "unk_token": "[UNK]"}), "cannot read a prompt.*UNK"),
    (lambda t: t.update(post_processor=adding("<|im_end|>")), "post_processor"),
])
def test_tokenizers_that_do_not_fit(checkpoint, change, words):
    """Before a weight is read: tokens past the embedding, the template's tokens, randomness."""
    edit(checkpoint / "tokenizer/tokenizer.json", change)
    if words is None:
        assert convert_weights.open_model(checkpoint)
    else:
        with pytest.raises(UserError, match=words):
            convert_weights.open_model(checkpoint)


def test_a_panic_of_the_tokenizers_library_is_an_error(checkpoint):
    """Its PanicException is no Exception. This file panics at words that are not known."""
    path = checkpoint / "tokenizer/tokenizer.json"
    edit(path, lambda t: t.update(normalizer={"type": "Prepend", "prepend": ""}))
    tokenizer = Tokenizer.from_file(str(path))
    with pytest.raises(UserError, match="cannot read 'x'"):
        sampler.token_ids(tokenizer, "x")


@pytest.mark.parametrize("change, words", [
    ({"add_prefix_space": True}, "add_prefix_space"),
    ({"split_special_tokens": True}, "split_special_tokens"),
    ({"add_bos_token": True}, "add_bos_token"),
    ({"add_eos_token": True}, "add_eos_token"),
    ({"extra_special_tokens": ["<|im_end|>", "cat "]}, "adds the token 'cat '"),
    ({"additional_special_tokens": [{"content": "cat "}]}, "adds the token 'cat '"),
    ({"added_tokens_decoder": {"499": {"content": "cat "}}}, "adds the token 'cat '"),
    ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, "adds the token '<.im_end.>'"),
    ({"added_tokens_decoder": [1]}, "as transformers does"),
    ({"extra_special_tokens": 3}, "as transformers does"),
    ({"chat_template": "{{ messages[0].content }}"}, None),          # the .jinja file wins
])
def test_tokenizer_configurations(checkpoint, change, words):
    edit(checkpoint / "tokenizer/tokenizer_config.json", change)
    if words is None:
        assert convert_weights.open_model(checkpoint)
        (checkpoint / "tokenizer/chat_template.jinja").unlink()
        words = "chat template"
    with pytest.raises(UserError, match=words):
        convert_weights.open_model(checkpoint)


def test_tokenizer_of_the_release_with_a_tiny_encoder(checkpoint):
    (checkpoint / "tokenizer/tokenizer.json").write_bytes(
        lzma.decompress((DATA / "qwen3_tokenizer.json.xz").read_bytes()))
    assert refused(run_here(sampler.main, "a cat", "--model", checkpoint), "belong together")


# --- Files gone wrong ---------------------------------------------------------------------------


def test_names_and_shapes_are_checked_both_ways(checkpoint):
    def damage(tensors):
        tensors["stranger.weight"] = torch.zeros(2)
        tensors["encoder.conv_in.bias"] = torch.zeros(3)
        del tensors["decoder.conv_out.bias"]
    edit(checkpoint / "vae/diffusion_pytorch_model.safetensors", damage)
    with pytest.raises(UserError) as error:
        load_vae(checkpoint / "vae")
    for part in ("missing: decoder.conv_out.bias", "unexpected: stranger.weight",
                 "encoder.conv_in.bias [3] instead of [8]"):
        assert part in str(error.value)


def test_ours_is_checked_too(tmp_path):
    convert_weights.convert(TINY, tmp_path / "ours")
    edit(tmp_path / "ours/dit.safetensors", lambda t: t.pop("layers.0.attention.to_q.weight"))
    with pytest.raises(UserError, match="missing: layers.0.attention.to_q.weight"):
        load_dit(tmp_path / "ours")


def test_part_of_the_unused_layer_missing(checkpoint):
    edit(checkpoint / "text_encoder/model.safetensors",
         lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(UserError, match="missing: model.layers.3.mlp.up_proj.weight"):
        load_text_encoder(checkpoint / "text_encoder")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_named(checkpoint, value):
    name = "encoder.conv_in.bias"
    edit(checkpoint / "vae/diffusion_pytorch_model.safetensors",
         {name: torch.full((8,), value)})
    with pytest.raises(UserError, match=f"{name} is not finite"):
        load_vae(checkpoint / "vae")


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd",
                                   "..\\x.safetensors", "x.bin", 7, ""])
def test_shard_names_cannot_leave_the_directory(checkpoint, shard):
    edit(checkpoint / INDEX, lambda d: d["weight_map"].update(x_pad_token=shard))
    with pytest.raises(UserError, match="index.json names the shard"):
        load_dit(checkpoint / "transformer")


def test_tensor_in_two_shards(checkpoint):
    edit(checkpoint / SHARD.format(5), {"x_pad_token": torch.zeros(1, 48)})
    with pytest.raises(UserError, match="x_pad_token is in both"):
        load_dit(checkpoint / "transformer")


TRANSFORMER, ENCODER, AUTOENCODER = (f"{folder}/config.json" for folder in
                                     ("transformer", "text_encoder", "vae"))


@pytest.mark.parametrize("file, change", [
    (INDEX, b"[]"), (INDEX, b"{}"), (INDEX, b"\xff\xfe{"), (INDEX, b'{"weight_map": {}}'),
    (SHARD.format(2), None), (SHARD.format(2), b""), (SHARD.format(2), b"\x80\x04N."),
    (TRANSFORMER, None), (TRANSFORMER, b"[" * 200_000),
    (TRANSFORMER, {"_class_name": "FluxTransformer2DModel"}),
    (TRANSFORMER, {"dim": "48"}), (TRANSFORMER, {"dim": 47}), (TRANSFORMER, {"n_layers": True}),
    (TRANSFORMER, {"n_layers": 4}), (TRANSFORMER, {"n_layers": 100_000}),
    (TRANSFORMER, {"norm_eps": None}), (TRANSFORMER, {"norm_eps": float("nan")}),
    (TRANSFORMER, {"axes_dims": [4, 6]}), (TRANSFORMER, {"axes_dims": [5, 5, 6]}),
    (TRANSFORMER, {"quantization_config": {"quant_method": "bitsandbytes"}}),
    (ENCODER, {"model_type": "llama"}), (ENCODER, {"num_key_value_heads": 3}),
    (AUTOENCODER, {"_class_name": "AutoencoderTiny"}), (AUTOENCODER, {"norm_num_groups": 3}),
    (AUTOENCODER, {"block_out_channels": [8, -8, 16, 16]}),
    (AUTOENCODER, {"block_out_channels": [2 ** 30] * 4}),
    (ENCODER, {"hidden_size": 2 ** 31 - 1, "vocab_size": 2 ** 31 - 1}),
    (ENCODER, {"intermediate_size": 2 ** 31 - 1, "hidden_size": 2 ** 31 - 1}),
    (TRANSFORMER, {"dim": 2 ** 30, "n_heads": 1, "n_kv_heads": 1,
                   "axes_dims": [2, 2, 2 ** 30 - 4]}),
    ("scheduler/scheduler_config.json", b'{"shift": 3.0}'),
    ("scheduler/scheduler_config.json", {"shift": "3"}),
    ("scheduler/scheduler_config.json", {"shift": 10 ** 400}),
    ("scheduler/scheduler_config.json", None),
    ("tokenizer/tokenizer.json", b"{}"), ("tokenizer/tokenizer.json", None),
])
def test_damaged_checkpoints(checkpoint, file, change):
    """One sentence that names the file, exit code 2, from both commands."""
    path = checkpoint / file
    if isinstance(change, dict):
        edit(path, change)
    else:
        path.unlink()
        if change is not None:
            path.write_bytes(change)
    folder = path.parent.name
    assert refused(run_here(sampler.main, "a cat", "--model", checkpoint), folder)
    assert refused(run_here(convert_weights.main, checkpoint, checkpoint.parent / "new"), folder)
    assert not (checkpoint.parent / "new").exists()


@pytest.mark.parametrize("dit, vae, words", [
    ({"cap_feat_dim": 8}, {}, "text features of another width"),
    ({}, {"latent_channels": 8}, "different latent channels"),
    ({"axes_lens": (16, 64, 64)}, {}, "512"),
])
def test_networks_that_do_not_belong_together(tmp_path, dit, vae, words):
    p = sampler.load_pipeline(TINY)
    small = {"dim": 8, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "cap_feat_dim": 32,
             "axes_dims": (4, 2, 2)}
    other_dit = DiT(DiTConfig(**{**small, **dit}))
    small = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 1}
    other_vae = VAE(VAEConfig(**{**small, **vae}))
    convert_weights.save_pipeline(tmp_path / "mixed", other_dit, p.text_encoder, other_vae,
                                  p.tokenizer, 3.0)
    assert refused(run_here(sampler.main, "a cat", "--model", tmp_path / "mixed"), words)


@pytest.mark.parametrize("kind, config", [
    ("text_encoder", TextEncoderConfig(*[2 ** 20] * 3, 2, *[2 ** 20] * 3)),
    ("dit", DiTConfig(2 ** 20, 2 ** 20, 1, 1, 2 ** 10, cap_feat_dim=2 ** 20)),
    ("vae", VAEConfig(2 ** 20, 2 ** 20, (2 ** 20, 2 ** 20), 1))])
def test_the_largest_widths_can_be_described(kind, config):
    """So no configuration ends in PyTorch's error that a size overflows."""
    assert formats.LARGEST_INT == 2 ** 20
    convert_weights.expected_tensors(kind, config)


# --- Writing ------------------------------------------------------------------------------------


def test_help_says_the_dtype():
    text = " ".join(run_here(convert_weights.main, "--help").stdout.split())
    assert "default: as stored; bfloat16 where that is quantized" in text


def test_no_thread_is_left_when_a_command_ends(tmp_path):
    """A daemon thread may still run while Python ends, and crash there."""
    code = ("import sys, threading, convert_weights\nsys.argv = sys.argv[:3]\n"
            "convert_weights.main()\nprint(threading.active_count())")
    result = subprocess.run([sys.executable, "-c", code, TINY, tmp_path / "new"], cwd=ROOT,
                            capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "1", result.stderr


def test_convert_command(checkpoint, tmp_path):
    assert run("convert_weights.py", checkpoint, tmp_path / "ours").returncode == 0
    before = sorted(tmp_path.rglob("*"))
    assert refused(run_here(convert_weights.main, checkpoint, tmp_path / "ours"), "exists already")
    nowhere = tmp_path / "nowhere"
    assert refused(run_here(convert_weights.main, nowhere, tmp_path / "new"), "nowhere")
    assert refused(run_here(convert_weights.main, checkpoint), "SRC and DST")
    assert refused(run_here(convert_weights.main, checkpoint, tmp_path / "new", "--dtype", "int8",
                            "--to", "official"), "int8")
    edit(checkpoint / INDEX, lambda d: d["weight_map"].update(x_pad_token="../x.safetensors"))
    assert refused(run_here(convert_weights.main, checkpoint, tmp_path / "new"), "../x.safetensors")
    assert sorted(tmp_path.rglob("*")) == before              # nothing half-written is left


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


@pytest.mark.slow
def test_disk_full_leaves_nothing(tmp_path):
    """A file larger than the process may write stands in for the full disk."""
    result = run("convert_weights.py", TINY, tmp_path / "new", preexec_fn=limit_file_size)
    assert refused(result, "cannot write", "new", "File too large")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    result = run("convert_weights.py", TINY, tmp_path / "empty", preexec_fn=limit_file_size)
    assert refused(result, "cannot write")
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_saving_replaces_all_or_nothing(tmp_path, monkeypatch):
    p, saved = sampler.load_pipeline(TINY), tmp_path / "saved"
    saved.mkdir()
    (saved / "notes.txt").write_text("mine")
    parts = (saved, p.dit, p.text_encoder, p.vae, p.tokenizer)
    convert_weights.save_pipeline(*parts, 2.0)
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    assert before.keys() == {"notes.txt", "config.json", "dit.safetensors", "vae.safetensors",
                             "text_encoder.safetensors", "tokenizer.json"}
    full = OSError(28, "No space left on device")

    def fail(*arguments):
        raise full
    monkeypatch.setattr(convert_weights, "write_json", fail)
    with pytest.raises(UserError, match="No space left"):
        convert_weights.save_pipeline(*parts, 4.0)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


HANG = """
import sys, time
from pathlib import Path
import files
def write(part):
    part.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
if sys.argv[1] == "file":
    files.write_whole("target", write)
with files.new_directory("target", replace=True) as folder:
    write(folder / "x")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_leftovers_of_killed_writers_are_removed(tmp_path, kind):
    """By the next writer, whatever the process ids are; what a living one writes is left alone."""
    def start():
        process = subprocess.Popen([sys.executable, "-c", HANG, kind], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(DATA.parent.parent)})
        assert process.stdout.readline() == "writing\n"
        return process

    def parts():
        return sorted(path for path in tmp_path.rglob("*part-*"))

    def write():
        if kind == "file":
            files.write_whole(tmp_path / "target", lambda part: part.write_text("new"))
        else:
            with files.new_directory(tmp_path / "target", replace=True) as folder:
                (folder / "x").write_text("new")

    dead = start()
    dead.kill()
    dead.wait()
    assert len(parts()) == 1
    living = start()
    assert len(parts()) == 1                      # the dead one's is gone, the living one's is here
    write()
    assert len(parts()) == 1
    living.kill()
    living.wait()
    write()
    assert parts() == []
    target = tmp_path / "target" if kind == "file" else tmp_path / "target/x"
    assert target.read_text() == "new"


def test_fingerprint(checkpoint, tmp_path):
    """What is in a model counts, not where it lies nor what lies beside."""
    before = convert_weights.fingerprint(checkpoint)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    (moved / "log.txt").write_text("x")
    assert convert_weights.fingerprint(moved) == before
    edit(moved / "vae/diffusion_pytorch_model.safetensors",
         lambda t: t.update({"encoder.conv_in.bias": t["encoder.conv_in.bias"] + 1e-3}))
    assert convert_weights.fingerprint(moved) != before
    large = tmp_path / "large.safetensors"
    with open(large, "wb") as file:               # a sparse file, above the limit for reading all
        file.truncate((1 << 26) + 4096)
    before, start = convert_weights.fingerprint(large), time.perf_counter()
    with open(large, "r+b") as file:
        file.seek(1 << 25)
        file.write(bytes(range(256)) * 512)       # 128 KB in the middle
    assert convert_weights.fingerprint(large) != before
    assert time.perf_counter() - start < 5


def test_the_fingerprint_of_a_large_text_file_is_of_all_of_it(tmp_path):
    """A file of prompts is read whole: one that differs in a single line is another one."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"a panda\n" * (9 << 20))                      # 72 MB
    before = convert_weights.fingerprint(prompts)
    with open(prompts, "r+b") as file:
        file.seek(8 * 12345)
        file.write(b"a tiger")
    assert convert_weights.fingerprint(prompts) != before


def test_writers_that_come_between_each_other(tmp_path, monkeypatch):
    """A path may vanish between two calls: another writer took it for that of a dead process."""
    fcntl = pytest.importorskip("fcntl")
    made, removed = [], []

    def make(path):
        path.touch()
        made.append(path)
        if len(made) == 1:                        # removed before it is locked
            path.unlink()

    with files.temporary(tmp_path, make) as part:
        assert part == made[1] and part.exists()
        with files.temporary(tmp_path, Path.touch) as other_part:
            assert part.exists() and other_part != part
    assert not [*tmp_path.iterdir()]

    def lock(descriptor, how):                    # removed between opening and locking
        if not removed:
            removed.append(made[-1])
            made[-1].unlink()
        return fcntl.flock.__wrapped__(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", functools.wraps(fcntl.flock)(lock))
    with files.temporary(tmp_path, make) as part:
        assert part.exists() and part != removed[0]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [tmp_path / ".part-gone"])
    with files.temporary(tmp_path, Path.touch) as part:
        assert part.exists()


@pytest.mark.parametrize("options, good, bad", [
    ({"low": 1, "high": 8, "kind": int}, ["1", "8"], ["0", "9", "2.5", "x", "", "1e3"]),
    ({"above": 0}, ["1e-9", "7"], ["0", "-1", "nan", "inf"]),
    ({}, ["-3", "1e30"], ["nan", "inf", "1e999"]),
])
def test_numbers_of_options(options, good, bad):
    parser = convert_weights.Parser()
    parser.add_argument("--x", type=convert_weights.number(**options))
    for text in good:
        assert parser.parse_args([f"--x={text}"]).x == float(text)
    for text in bad:
        with pytest.raises(UserError, match="--x"):
            parser.parse_args([f"--x={text}"])


def test_check_command(tmp_path, monkeypatch):
    result = run_here(convert_weights.main, "--check", TINY)
    assert refused(result, "16 of 16 files", "transformer/config.json (wrong)",
                   "text_encoder/model-00001-of-00003.safetensors (missing)")
    states = [line.split()[0] for line in result.stdout.splitlines()]
    assert len(states) == 16 and set(states) == {"wrong", "missing"}
    assert refused(run_here(convert_weights.main, "--check", tmp_path / "nowhere"), "nowhere")
    assert refused(run_here(convert_weights.main, TINY, tmp_path / "x", "--check", TINY), "alone")
    for words in (["--to", "official"], ["--dtype", "int8"], ["--lora", "x"], ["--vae", "x"]):
        assert refused(run_here(convert_weights.main, "--check", TINY, *words), "alone")
    # The real list, checked on the one file of the release that is here.
    name = "tokenizer/tokenizer.json"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / name).write_bytes(lzma.decompress((DATA / "qwen3_tokenizer.json.xz").read_bytes()))
    assert dict(formats.check_release(tmp_path))[name] == "ok"
    monkeypatch.setattr(formats, "OFFICIAL_MD5", {name: formats.OFFICIAL_MD5[name]})
    assert formats.check_release(tmp_path) == [(name, "ok")]


@pytest.mark.parametrize("words", [["", "new"], [TINY, ""], ["--check", ""]])
def test_an_empty_name_is_not_the_current_directory(checkpoint, monkeypatch, words):
    monkeypatch.chdir(checkpoint)
    assert refused(run_here(convert_weights.main, *words), "empty")
    assert not (checkpoint / "new").exists()
