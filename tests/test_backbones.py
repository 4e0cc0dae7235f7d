import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, reference_state

import check_dims
from backbones import BACKBONES, build_backbone, parameter_depths
from errors import UserError

# Every 29th value of what public implementations give on these weights (see tests/parity/README.md)
GOLDEN = np.load(ROOT / "tests" / "parity" / "golden.npz")
NAMES = {
    "ecvitt": "ecvitt",
    "ecvittplus": "ecvittplus",
    "ecvits": "ecvits",
    "ecvitsplus": "ecvitsplus",
    "dinov3-vits16": "dinov3_vits16",
    "dinov3-convnext-tiny": "dinov3_convnext_tiny",
    "dinov2-small": "dinov2_vits14",
}


def golden_image(name):
    shape = tuple(int(n) for n in GOLDEN[f"{name}/shape"])
    values = np.random.Generator(np.random.PCG64(int(GOLDEN[f"{name}/seed"]))).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_features_agree_with_the_reference_implementation(name, tmp_path):
    file = NAMES[name]
    torch.save(reference_state(file), tmp_path / "weights.pth")
    backbone = build_backbone(name, tmp_path / "weights.pth").eval()
    images = golden_image(file)
    with torch.no_grad():
        maps, features = backbone(images), backbone.forward_features(images)
        if name.startswith("ecvit"):
            tokens = backbone.backbone(images)[2]
            got = {f"level{i}": m for i, m in enumerate(maps)} | {f"tokens{i}": tokens[i][:, 1:] for i in (10, 11)}
        elif "convnext" in name:
            got = {f"stage{i}": m for i, m in enumerate(maps)}
        else:
            middle, last = build_backbone(name, tmp_path / "weights.pth", layers=(5, 11)).eval()(images)
            assert torch.equal(last, maps[0])
            got = {"mid": middle, "last": last}
    got |= {
        key: features[key]
        for key in ("x_norm_clstoken", "x_norm_patchtokens")
        if key in features and not name.startswith("ecvit")
    }
    # transformers resizes DINOv2's position embedding without the original's offset of 0.1
    tolerance = 1e-2 if name == "dinov2-small" else 1e-4
    compared = [key.split("/")[1] for key in GOLDEN.files if key.startswith(f"{file}/")]
    assert set(compared) - {"shape", "seed"} == set(got)
    for key, value in got.items():
        assert np.abs(value.flatten()[::29].numpy() - GOLDEN[f"{file}/{key}"]).max() < tolerance, key


@pytest.mark.parametrize(
    "name", ["ecvitt", "dinov3-vits16", "dinov2-small-reg", "dinov3-vits16plus", "dinov3-convnext-tiny"]
)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_file_that_does_not_fit_names_the_weight(name, fault, tmp_path):
    file = {"dinov2-small-reg": "dinov2_vits14_reg", "dinov3-vits16plus": "dinov3_vits16plus"}.get(name) or NAMES[name]
    state = reference_state(file)
    key = next(k for k in state if k.endswith(("mlp.fc1.weight", "mlp.w1.weight", "pwconv1.weight")))
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        state["some.other.weight"] = torch.zeros(3)
    else:
        state[key] = torch.zeros(5, 5)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not the weights of|some.other.weight") as caught:
        build_backbone(name, tmp_path / "weights.pth")
    wanted = {"unexpected": "some.other.weight", "missing": "1 missing", "shape": "shape"}[fault]
    assert wanted in str(caught.value)


def test_registers_and_gated_files_of_meta_load(tmp_path):
    for name, file in (("dinov2-small-reg", "dinov2_vits14_reg"), ("dinov3-vits16plus", "dinov3_vits16plus")):
        torch.save(reference_state(file), tmp_path / "weights.pth")
        assert torch.isfinite(build_backbone(name, tmp_path / "weights.pth").eval()(torch.zeros(1, 3, 64, 64))[0]).all()


@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-small-reg", "dinov3-vits16", "dinov3-convnext-tiny"])
def test_a_hugging_face_folder_gives_back_the_model_that_was_saved(name, tmp_path):
    original = build_backbone(name)
    original.model.save_pretrained(tmp_path)
    loaded = build_backbone(name, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values()))


def test_a_folder_with_a_weight_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    build_backbone("dinov3-vits16").model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(k for k in state if "layer.3." in k)
    del state[key]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 missing"):
        build_backbone("dinov3-vits16", tmp_path)


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    build_backbone("dinov3-vits16").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type is dinov3_vit, that of dinov2-small is dinov2"):
        build_backbone("dinov2-small", tmp_path)
    with pytest.raises(UserError, match="hidden_size is 384, that of dinov3-vitb16 is 768"):
        build_backbone("dinov3-vitb16", tmp_path)


def test_user_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nearest: dinov3-vits16"):
        build_backbone("dinov3-vit-s16")
    with pytest.raises(UserError, match="no released weights"):
        build_backbone("ecvit-nano", "pretrained")
    with pytest.raises(UserError, match="no such"):
        build_backbone("dinov2-small", tmp_path / "nowhere")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("ecvitt", "dinov3-vits16"):
        with pytest.raises(UserError, match="can't be read as weights"):
            build_backbone(name, tmp_path / "text.pth")

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    def gated(*args, **kwargs):
        raise OSError("You are trying to access a gated repo. 401 Client Error")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="can't be reached .* --backbone-weights none"):
        build_backbone("dinov3-vits16", "pretrained")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(UserError, match="accept its licence"):
        build_backbone("dinov3-vits16", "pretrained")


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="can't be read as weights"):
        build_backbone("ecvitt", tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["ecvit-nano", "dinov2-small", "dinov3-vits16", "dinov3-convnext-tiny"])
def test_any_picture_size_gives_maps_of_the_padded_size(name):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 75, 131))
    divisor = backbone.size_divisor
    h, w = -(-75 // divisor) * divisor, -(-131 // divisor) * divisor
    assert [tuple(m.shape) for m in maps] == [
        (1, c, h // s, w // s) for c, s in zip(backbone.channels, backbone.strides)
    ]


def test_published_parameter_counts():
    """In millions, from the papers and model cards; the 7B model is 4096 wide."""
    published = {
        "dinov2-small": 22.1,
        "dinov2-giant": 1136,
        "dinov3-vits16": 21.6,
        "dinov3-vits16plus": 28.7,
        "dinov3-vitb16": 85.7,
        "dinov3-vitl16": 303,
        "dinov3-vith16plus": 840,
        "dinov3-vit7b16": 6716,
        "ecvitt": 5.6,
        "ecvitsplus": 29.6,
        "clip-vitb16": 86.2,
        "clip-vitl14": 304,
        "mae-vitb16": 86,
        "mae-vitl16": 304,
        "mae-vith14": 632,
        "vggt-vitl14": 304,
    }
    for name, millions in published.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build_backbone(name).parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.01), name
    assert BACKBONES["dinov3-vit7b16"].width == 4096


@pytest.mark.parametrize(
    "name, others",
    [
        ("dinov3-vits16", ("dinov3-vitb16", "dinov2-small", "dinov3-vitl16", "dinov2-small-reg")),
        ("dinov3-convnext-tiny", ("dinov3-convnext-small", "dinov3-convnext-base", "dinov3-vits16")),
        ("ecvits", ("ecvitt", "ecvitsplus", "ecvit-nano")),
    ],
)
def test_the_table_notices_a_backbone_that_is_not_as_it_says(name, others):
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert check_dims.disagreements("x", BACKBONES[name], backbone) == []
    for other in others:
        assert check_dims.disagreements("x", BACKBONES[other], backbone), other


@pytest.mark.parametrize("name", ["ecvit-nano", "dinov3-vits16", "dinov2-small"])
def test_recomputed_activations_give_the_same_gradients(name):
    torch.manual_seed(0)
    plain = build_backbone(name).train()
    saving = build_backbone(name, checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for backbone in (plain, saving):
        sum(m.square().mean() for m in backbone(images)).backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert (a.grad is None) == (b.grad is None), key
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6), key


def test_layer_depths_rise_from_the_embedding_to_the_head():
    depths = parameter_depths(build_backbone("dinov3-vits16"))
    assert {d for n, d in depths.items() if "embeddings" in n} == {0}
    assert {d for n, d in depths.items() if "layer.0." in n} == {1} and {
        d for n, d in depths.items() if "layer.11." in n
    } == {12}
    assert {d for n, d in depths.items() if n.endswith("model.norm.weight")} == {13}
