"""Which device and precision a machine gets; what no machine here has is pretended."""

import pytest
import torch
import transformers

import devices
import weights
from devices import choose_device, choose_precision
from errors import UserError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "bfloat16, capability, training, detecting",
    [
        (True, (8, 0), "bfloat16", "bfloat16"),
        (False, (7, 5), "float16", "float16"),
        (False, (7, 0), "float16", "float16"),
        (False, (6, 1), "float32", "float32"),
    ],
)
def test_a_gpu_computes_in_what_it_is_fast_at(bfloat16, capability, training, detecting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert choose_precision("auto", CUDA) == training and choose_precision("auto", CUDA, training=False) == detecting
    allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    found = choose_precision("float32", CUDA), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    assert allowed == ("high", True) and found == ("float32", "highest", False)


def test_a_cpu_detects_in_float32_unless_it_is_told_otherwise(monkeypatch):
    for amx, avx512 in ((True, True), (True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512, raising=False)
        assert choose_precision("auto", CPU, training=False) == "float32"
        assert choose_precision("auto", CPU) == ("bfloat16" if amx or avx512 else "float32")
        assert choose_precision("bfloat16", CPU, training=False) == "bfloat16"
    with pytest.raises(UserError, match="--precision int8: has to be auto, float32"):
        choose_precision("int8", CPU)


def test_every_script_takes_the_same_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == CUDA and choose_device(3) == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(0) == CPU  # several processes on a Mac
    for script in ("train", "infer", "evaluate", "detector", "export", "tools/benchmark", "tools/features"):
        assert "cuda.is_available" not in (weights.Path(devices.__file__).parent / f"{script}.py").read_text(), script


def test_autocast_is_what_it_says():
    with devices.autocast("bfloat16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with devices.autocast("float32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "name, weighed",
    [("ecvitt", True), ("vggt-vitl14", True), ("mae-vitb16", True), ("dinov2-small", False), ("mum-vitl16", False)],
)
def test_a_licence_that_forbids_commercial_use_is_said_before_the_download(
    name, weighed, tmp_path, monkeypatch, capsys
):
    """And what is free instead; nothing is said of what is here already."""
    from backbones import build_backbone

    said = []

    def refuse(*_, **__):
        said.append(capsys.readouterr().out)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match="can't be (reached|downloaded)"):
        build_backbone(name, "pretrained")
    assert len(said) == 1 and ("licence forbids commercial use" in said[0]) == weighed
    assert not weighed or "dinov2-small (Apache-2.0)" in said[0]


def test_a_released_detector_says_it_too(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    from checkpoint import read_checkpoint

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for module, function in ((torch.hub, "download_url_to_file"), (huggingface_hub, "hf_hub_download")):
        monkeypatch.setattr(module, function, lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    for name in ("ecdet_s.pth", "Intellindust/ECDet_S"):
        with pytest.raises(UserError):
            read_checkpoint(name)
        assert capsys.readouterr().out.count("licence forbids commercial use") == 1


@pytest.mark.parametrize(
    "error, gated",
    [
        (OSError("You are trying to access a gated repo."), True),
        (OSError("/data/401/403.bin: No such file or directory"), False),
        (OSError("sha256 401ab403 differs"), False),
    ],
)
def test_a_path_with_401_in_it_is_not_a_gated_repository(error, gated):
    assert weights.is_gated(error) == gated
    wrapped = OSError("it failed")
    wrapped.__cause__ = error
    assert weights.is_gated(wrapped) == gated
