"""VGGT: the numbers of the reference, its files, cameras, and the command."""

import json
import math

import features
import numpy as np
import pytest
import torch
from conftest import ROOT, reference_weight, tiny_config
from PIL import Image
from test_commands import called

import reconstruct
import vggt_heads
from backbones import BACKBONES, build_backbone, parameter_depths
from detr_model import DETECTORS, build_model
from errors import UserError
from vggt import VGGTBackbone, normalize, read_vggt, rotation_of
from vggt_heads import VGGT, cameras_to_pose, matrix_to_quaternion, pose_to_cameras, quaternion_to_matrix, unproject

GOLDEN = np.load(ROOT / "tests" / "parity" / "golden_vggt.npz")
DIMS = dict(dim=384, heads=6, pairs=4, patch=14, encoder_depth=12)
WIDTHS = (48, 96, 192, 384)
SMALL = dict(
    dims=DIMS,
    entries=(0, 1, 2, 3),
    camera=dict(heads=8, depth=2),
    dpt=dict(dim=64, widths=WIDTHS),
    track=dict(dim=64, hidden=128, levels=5, widths=WIDTHS),
)
SIZE = 70, 98


def filled(state):
    """Weights drawn as the reference's were; plain drawing gives no field of view and chaotic tracks."""
    state = {key: reference_weight(key, value.shape) for key, value in state.items()}
    for key, value in state.items():
        if "updateformer.flow_head." in key:
            state[key] = 0.02 * value
        elif key == "camera_head.pose_branch.fc2.weight":
            value[7] *= 0.1
        elif key == "camera_head.pose_branch.fc2.bias":
            value[7] = 0.3
    return state


def small_vggt(**more):
    model = VGGT(**SMALL | more)
    model.load_state_dict(filled(model.state_dict()))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_vggt()


@pytest.fixture(scope="module")
def released_file(model, tmp_path_factory):
    """The small configuration's file, as VGGT-1B is released."""
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == released("small")
    path = tmp_path_factory.mktemp("released") / "model.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images():
    rng = np.random.Generator(np.random.PCG64(int(GOLDEN["seed"])))
    return torch.from_numpy(rng.standard_normal(tuple(GOLDEN["shape"])).astype(np.float32))


def agrees(name, value, within=1e-4):
    expected = torch.from_numpy(GOLDEN[name]).flatten()
    found = value.flatten()[:: int(GOLDEN[f"stride/{name}"])]
    assert found.shape == expected.shape and (found - expected).abs().max() < within, name


@torch.no_grad()
def test_every_part_gives_the_references_numbers(model, images, monkeypatch):
    steps = {name: tokens for name, i, tokens in model.aggregator.run(normalize(images)) if i == 0}
    agrees("patch_tokens", steps["patch_embed"])
    entries = model.aggregator(normalize(images))
    for i in range(4):
        agrees(f"tokens{i}", entries[i])
    codes = model.camera_head(entries[3])
    for i in range(4):
        agrees(f"pose_enc{i}", codes[i])
    agrees("extrinsic", pose_to_cameras(codes[3], SIZE)[0])

    inside = {"corr": [], "update": []}
    correlate, update = vggt_heads.correlate, model.track_head.tracker.updateformer

    def recorded(*given):
        inside["corr"].append(correlate(*given))
        return inside["corr"][-1]

    monkeypatch.setattr(vggt_heads, "correlate", recorded)
    handle = update.register_forward_hook(lambda module, given, out: inside["update"].append((given[0], out)))
    queries = torch.from_numpy(GOLDEN["query_points"])
    found = model(images, queries)
    handle.remove()
    for i in (0, 1):
        agrees(f"corr{i}", inside["corr"][i].transpose(1, 2))
    agrees("update_in0", inside["update"][0][0])
    agrees("update0", inside["update"][0][1])
    agrees("pose_enc3", found["pose"])
    agrees("depth", found["depth"])
    agrees("depth_conf", found["depth_confidence"])
    agrees("world_points", found["points"], 2e-4)
    agrees("world_points_conf", found["points_confidence"], 2e-4)
    agrees("track_features", model.track_head.feature_extractor(entries, SIZE, 14))
    tracks, visible, confident = model.track_head(entries, SIZE, 14, queries)
    for i in range(4):
        agrees(f"track{i}", tracks[i])
    agrees("vis", visible, 5e-4)
    agrees("conf", confident, 5e-4)
    assert torch.equal(found["tracks"], tracks[-1]) and torch.equal(found["visibility"], visible)


@torch.no_grad()
def test_the_encoder_of_one_convolution_gives_the_references_numbers(images):
    aggregator = small_vggt(encoder="conv", heads=()).aggregator
    steps = {name: tokens for name, i, tokens in aggregator.run(normalize(images)) if i == 0}
    entries = aggregator(normalize(images))
    agrees("conv/patch_tokens", steps["patch_embed"])
    agrees("conv/tokens0", entries[0])
    agrees("conv/tokens3", entries[3])


@torch.no_grad()
def test_any_plain_vit_may_be_the_encoder(images):
    """A DINOv2-S of ours instead of VGGT's own: its patch tokens, then the same blocks, composed here once more."""
    torch.manual_seed(0)
    encoder = build_backbone("dinov2-small").eval()
    own = VGGT(**SMALL | dict(encoder=encoder, heads=())).eval().aggregator
    x = normalize(images)
    patches = encoder.forward_features(x.flatten(0, 1))["x_norm_patchtokens"]
    special = torch.cat([own.camera_token, own.register_token], dim=2)[0]  # (2, 5, C)
    frames = [torch.cat([special[min(i % 3, 1)], tokens]) for i, tokens in enumerate(patches)]
    tokens, rotation = torch.stack(frames), rotation_of(5, 7, 64)
    everywhere = [table.repeat(3, 1, 1) for table in rotation]
    for frame_block, global_block in zip(own.frame_blocks, own.global_blocks):
        tokens = frame_block(tokens, rotation)
        tokens = global_block(tokens.reshape(2, 3 * 40, -1), everywhere).reshape(6, 40, -1)
    assert (own(x)[3][..., 384:].flatten(0, 1) - tokens).abs().max() < 1e-5
    narrow = DIMS | dict(dim=192, heads=3)
    projected = VGGT(**SMALL | dict(encoder=encoder, dims=narrow, heads=()))
    assert projected.aggregator(x[:1])[3].shape == (1, 3, 40, 384)


def test_positions_and_special_tokens(model):
    cos, sin = rotation_of(2, 3, 8)
    assert cos.shape == (5 + 6, 2, 2) and (cos[:5] == 1).all() and (sin[:5] == 0).all()
    rows, columns = torch.atan2(sin, cos)[5:, :, 0].T  # the first frequency is 1
    assert rows.tolist() == pytest.approx([1, 1, 1, 2, 2, 2]) and columns.tolist() == pytest.approx([1, 2, 3, 1, 2, 3])
    aggregator, seen = model.aggregator, []
    handle = aggregator.frame_blocks[0].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.no_grad():
        aggregator(torch.randn(1, 3, 3, 28, 28))
    handle.remove()
    tokens = seen[0][:, :5]
    expected = torch.cat([aggregator.camera_token, aggregator.register_token], dim=2)[0]
    assert (
        torch.equal(tokens[0], expected[0])
        and torch.equal(tokens[1], expected[1])
        and torch.equal(tokens[2], tokens[1])
    )


def released(name):
    return json.loads((ROOT / "tests" / "parity" / f"keys_vggt_{name}.json").read_text())


def test_names_and_shapes_are_those_of_vggt_1b():
    with torch.device("meta"):
        model = VGGT()
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == released("1b")
    assert sum(value.numel() for value in state.values()) == 1_256_537_516


def test_a_released_file_loads_strictly_and_says_what_it_leaves_out(
    released_file, small_command, tmp_path, monkeypatch, capsys
):
    """The file of the small configuration, through the command's loader."""
    state = torch.load(released_file)
    model = reconstruct.load_model(released_file.parent, ["camera", "depth"], "float32")  # the hub's folder
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    said = capsys.readouterr().out
    assert "are left out: 62 of point_head, " in said and "of track_head" in said
    del state["camera_head.trunk_norm.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="1 missing: camera_head.trunk_norm.bias"):
        reconstruct.load_model(tmp_path / "model.pt", ["camera", "depth"], "float32")
    with pytest.raises(UserError, match="neither model.safetensors nor model.pt"):
        read_vggt(tmp_path.parent, ["aggregator"])


# Cameras


def random_rotations(count):
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    return q * torch.linalg.det(q)[:, None, None]


def test_pose_codes_are_cameras_and_back(images):
    code = torch.from_numpy(GOLDEN["pose/code"]).reshape(2, 3, 9)
    extrinsics, intrinsics = pose_to_cameras(code, SIZE)
    agrees("pose/extrinsic", extrinsics)
    agrees("pose/intrinsic", intrinsics, 1e-3)
    agrees("pose/back", cameras_to_pose(extrinsics, intrinsics, SIZE))
    depth = torch.from_numpy(GOLDEN["pose/depth"]).reshape(3, *SIZE)
    agrees("pose/points", unproject(depth, extrinsics[0], intrinsics[0]))
    torch.manual_seed(0)
    rotations = random_rotations(500)
    quaternions = matrix_to_quaternion(rotations)
    assert (quaternions[:, 3] >= 0).all() and (quaternion_to_matrix(3 * quaternions) - rotations).abs().max() < 1e-12
    half_turns = torch.diag_embed(torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64))
    assert (quaternion_to_matrix(matrix_to_quaternion(half_turns)) - half_turns).abs().max() < 1e-12


def test_points_of_a_plane_project_back_into_both_views():
    """Two views of the textured plane n.X = d from known cameras: pixels -> points -> pixels, and the same texture."""
    height, width = 60, 80
    size = height, width
    code = torch.zeros(2, 9, dtype=torch.float64)
    code[0, 3:] = torch.tensor([0, 0, 0, 1, 0.8, 1.0])
    code[1] = torch.tensor([0.3, -0.1, 0.2, 0.05, -0.1, 0.02, 0.99, 0.8, 1.0])
    extrinsics, intrinsics = pose_to_cameras(code, size)
    normal, distance = torch.tensor([0.1, -0.2, 1.0], dtype=torch.float64), 4.0
    v, u = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    for extrinsic, intrinsic in zip(extrinsics, intrinsics):
        rotation, translation = extrinsic[:, :3], extrinsic[:, 3]
        rays = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(intrinsic).T  # depth 1 in the camera
        centre = -rotation.T @ translation
        depth = (distance - normal @ centre) / ((rays @ rotation) @ normal)
        points = unproject(depth, extrinsic, intrinsic)
        assert (points @ normal - distance).abs().max() < 1e-9
        for other, its_intrinsic in zip(extrinsics, intrinsics):
            camera = points @ other[:, :3].T + other[:, 3]
            pixels = camera @ its_intrinsic.T
            again = unproject_at(pixels, other, its_intrinsic)
            assert (again - points).abs().max() < 1e-9
        own = points @ rotation.T + translation
        own = own @ intrinsic.T
        assert (own[..., 0] / own[..., 2] - u).abs().max() < 1e-9 and (own[..., 1] / own[..., 2] - v).abs().max() < 1e-9


def unproject_at(pixels, extrinsic, intrinsic):
    """Homogeneous pixels (..., 3), times their depth -> points of the world."""
    camera = pixels @ torch.linalg.inv(intrinsic).T
    return (camera - extrinsic[:, 3]) @ extrinsic[:, :3]


# As a backbone


@pytest.fixture
def tiny_backbone(monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(BACKBONES, "tiny-vggt-1b", replace(BACKBONES["vggt-1b"], width=32, depth=2, heads=2, ffn=128))
    return "tiny-vggt-1b"


@pytest.mark.parametrize("detector", DETECTORS)
def test_its_layers_serve_every_detector(detector, tiny_backbone):
    torch.manual_seed(0)
    config = tiny_config(detector, tiny_backbone, layers="frame0,global1")
    model, criterion, postprocess = build_model(config)
    images, mask = torch.randn(2, 3, 70, 90), torch.zeros(2, 70, 90, dtype=torch.bool)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}] * 2
    loss = sum(criterion(model.train()(images, mask, targets), targets).values())
    loss.backward()
    assert torch.isfinite(loss)
    used = [name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("patch_embed.blocks.1" in name for name in used) and any("frame_blocks.0" in name for name in used)
    found = postprocess(model.eval()(images, mask), torch.tensor([[70, 90]] * 2))
    assert all(torch.isfinite(f["boxes"]).all() for f in found)


def test_layers_have_names(tiny_backbone):
    backbone = build_backbone(tiny_backbone, layers=("all",))
    assert backbone.layers == ["patch_embed", "frame0", "global0", "frame1", "global1"]
    assert [tuple(m.shape) for m in backbone(torch.randn(2, 3, 28, 40))] == [(2, 32, 2, 3)] * 5
    features = backbone.forward_features(torch.randn(2, 3, 28, 42), layers=("global", "patch_embed"))
    assert list(features) == ["x_norm_patchtokens", "global0", "global1", "patch_embed"]
    assert features["global0"]["x_norm_patchtokens"].shape == (2, 6, 32)
    depths = parameter_depths(backbone)
    assert depths["aggregator.patch_embed.blocks.1.norm1.bias"] == 2
    assert depths["aggregator.global_blocks.0.norm1.bias"] == 3
    first = ["patch_embed.patch_embed.proj.bias", "patch_embed.cls_token", "patch_embed.pos_embed"]
    between = ["patch_embed.norm.bias", "camera_token", "register_token"]
    assert {depths[f"aggregator.{name}"] for name in between} == {2}
    assert depths["aggregator.patch_embed.pos_embed"] == 0 == depths[f"aggregator.{first[0]}"]
    with pytest.raises(UserError, match="--layers frame2: VGGT's are patch_embed, frame0 to frame1"):
        build_backbone(tiny_backbone, layers=("frame2",))
    with pytest.raises(UserError, match="--layers frame0: the blocks of dinov2-small are 0 to 11"):
        build_backbone("dinov2-small", layers=("frame0",))


def test_the_backbones_weights_are_a_part_of_the_released_file(tiny_backbone, tmp_path, capsys):
    spec = BACKBONES[tiny_backbone]
    state = VGGTBackbone("x", spec, None).state_dict()
    state = {key: reference_weight(key, value.shape) for key, value in state.items()}
    torch.save(state | {"depth_head.norm.bias": torch.zeros(3)}, tmp_path / "model.pt")
    backbone = build_backbone(tiny_backbone, tmp_path / "model.pt")
    assert "left out: 1 of depth_head" in capsys.readouterr().out
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    recomputing = build_backbone(tiny_backbone, tmp_path / "model.pt", checkpointing=True).train()
    images, calls = torch.randn(1, 3, 28, 28), []
    for b in (backbone.train(), recomputing):
        for module in (b.aggregator.patch_embed.blocks[0].norm1, b.aggregator.global_blocks[0].norm1):
            module.register_forward_hook(lambda *_, b=b: calls.append(b is recomputing))
        b(images)[0].sum().backward()
    assert calls.count(False) == 2 and calls.count(True) == 4  # the encoder's blocks and the pairs, twice each
    grads = [
        dict(b.named_parameters())["aggregator.frame_blocks.0.mlp.fc1.weight"].grad for b in (backbone, recomputing)
    ]
    assert torch.equal(*grads)


def test_features_are_drawn_by_layer(tiny_backbone, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (80, 60), (99, 9, 9)).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", "--backbone", f"{tiny_backbone}=none", "--image-size", 56, "--out", tmp_path / "f.png"]
    status, said, error = called(features.main, [*given, "--layers", "patch_embed,global"], monkeypatch, capsys)
    assert status == 0, error
    assert [line.split(":")[0].split(", ")[1] for line in said.splitlines()[:3]] == [
        "patch_embed",
        "global0",
        "global1",
    ]
    given[2] = "ecvit-nano=none"
    status, _, error = called(features.main, [*given, "--layers", "global1"], monkeypatch, capsys)
    assert status == 2 and "those names are VGGT's; ecvit-nano has blocks" in error


# The command


@pytest.fixture
def small_command(monkeypatch):
    """reconstruct.py with the small configuration in place of VGGT-1B."""
    monkeypatch.setattr(reconstruct, "VGGT", lambda heads: VGGT(heads, **SMALL))


def test_the_command_writes_a_scene(released_file, small_command, tmp_path, monkeypatch, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    for name, (w, h) in {"a.png": (200, 150), "b.jpg": (150, 200), "c.png": (300, 150)}.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / name)
    out = tmp_path / "out"
    arguments = [folder, "--weights", released_file, "--size", 140, "--track", "20,30", "150,100", "--out", out]
    status, said, error = called(reconstruct.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    assert "GB of memory are needed" in said and "3 images as 140x140" in said
    names = ["cameras.json", "depth-1.png", "depth-2.png", "depth-3.png", "points.ply", "tracks.jpg", "tracks.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    cameras = json.loads((out / "cameras.json").read_text())
    assert [c["offset"] for c in cameras["cameras"]] == [[0, 14], [0, -21], [0, 35]]  # 112, 182 cut to 140, 70
    assert np.array(cameras["cameras"][0]["extrinsics"]).shape == (3, 4)
    tracks = json.loads((out / "tracks.json").read_text())
    assert np.allclose(tracks[0]["points"], [[20, 30], [150, 100]], atol=1e-3)  # queries stay where they are
    data = (out / "points.ply").read_bytes()
    header, _, body = data.partition(b"end_header\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    assert count == math.ceil((112 + 140 + 70) * 140 / 2)  # half of the pixels that are not a border
    assert len(body) == 15 * count
    vertices = np.frombuffer(body, [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in "rgb"])
    assert all(np.isfinite(vertices[n]).all() for n in "xyz") and 100 < vertices["r"].mean() < 155

    for path in sorted(folder.glob("[bc]*")):
        path.unlink()
    for name in ("depth-map.png", "tracks.csv"):  # not ours
        (out / name).touch()
    status, said, error = called(reconstruct.main, [*arguments[:5], "--out", out], monkeypatch, capsys)
    assert status == 0, error
    left = ["cameras.json", "depth-1.png", "depth-map.png", "points.ply", "tracks.csv"]
    assert sorted(path.name for path in out.iterdir()) == left
    status, said, error = called(reconstruct.main, [*arguments[:5], "--out", folder], monkeypatch, capsys)
    assert status == 2 and "holds images that would be overwritten" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", 500], "--size 500: has to be a multiple of 14"),
        (["--keep", 0], "--keep 0.0: has to be a percentage"),
        (["--size", 140, "--track", "1;2"], "--track 1;2: has to be X,Y"),
        (["--size", 140, "--track", "900,2"], "--track 900,2: is not in the part of the first image"),
        (["--size", 140, "--fit", "pad", "--track", "20,165"], "is not in the part of the first image (160x160)"),
        (["--size", 70, "--track", "5,5"], "needs images of 140 pixels or more"),
        (["--size", 140, "--weights", "gone.pt"], "gone.pt: no such file"),
        (["--size", 140, "--offline"], "--offline forbids downloading it"),
    ],
)
def test_mistakes_in_reconstructing(arguments, message, small_command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    Image.new("RGB", (160, 160)).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", *arguments, "--out", tmp_path / "out"]
    status, _, error = called(reconstruct.main, given, monkeypatch, capsys)
    assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_does_not_fit_into_memory_is_said_before(small_command, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (160, 160)).save(tmp_path / "a.png")
    monkeypatch.setattr(reconstruct, "free_memory", lambda: 0.01)
    status, _, error = called(reconstruct.main, [tmp_path / "a.png", "--weights", "none"], monkeypatch, capsys)
    assert status == 2 and "that is more than is free" in error


def test_one_image_is_a_scene_and_untrained_weights_are_said(small_command, tmp_path, monkeypatch, capsys):
    Image.new("RGBA", (160, 90), (9, 99, 9, 128)).save(tmp_path / "a.png")
    given = [tmp_path / "a.png", "--weights", "none", "--size", 140, "--fit", "pad", "--points", "head"]
    status, said, error = called(
        reconstruct.main, [*given, "--precision", "bfloat16", "--out", tmp_path / "o"], monkeypatch, capsys
    )
    assert status == 0, error
    assert "1 images as 140x140" in said and (tmp_path / "o" / "depth-1.png").exists()


def test_images_are_fitted_as_the_original_does():
    """Against resizing the whole and cutting it; transparent parts are tested in tests/test_detecting.py."""
    rng = np.random.default_rng(0)
    tall = Image.fromarray(rng.integers(0, 255, (300, 100, 3), dtype=np.uint8))
    frame = reconstruct.fit(tall, 140, "crop")
    whole = np.asarray(tall.resize((140, 420), Image.BICUBIC))[140:280]
    assert np.abs(255 * frame["pixels"].permute(1, 2, 0).numpy() - whole).max() <= 1.001
    assert frame["offset"] == (0, -140) and frame["scale"] == (1.4, 1.4) and frame["is_image"].all()
    padded = reconstruct.fit(tall, 140, "pad")
    assert padded["pixels"].shape == (3, 140, 140) and padded["offset"] == (49, 0)
    assert padded["is_image"].sum() == 140 * 42 and (padded["pixels"][:, ~padded["is_image"]] == 1).all()
    with pytest.raises(UserError, match="an image of 4x400: has to be at most 20 times as long as wide"):
        reconstruct.fit(Image.new("RGB", (4, 400)), 140, "crop")
    wide = reconstruct.fit(Image.new("RGB", (200, 100)), 140, "crop")
    both = reconstruct.pad_to_largest([frame, wide])
    assert [f["pixels"].shape for f in both] == [(3, 140, 140)] * 2 and both[1]["offset"] == (0, 35)


def test_the_most_confident_points_are_kept(tmp_path):
    points, images = torch.arange(24.0).reshape(1, 2, 4, 3), torch.rand(1, 3, 2, 4)
    confidence = torch.tensor([[[1.0, 1, 1, 9], [torch.inf, 8, torch.nan, 1]]])
    is_image = torch.tensor([[[True, True, True, True], [True, True, True, False]]])
    assert reconstruct.write_points(tmp_path / "a.ply", points, confidence, is_image, images, 40) == 2  # of five
    body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")[2]
    vertices = np.frombuffer(body, [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in "rgb"])
    assert vertices["x"].tolist() == [9, 15]
    expected = (255 * images[0, :, [0, 1], [3, 1]]).round().int().tolist()
    assert [vertices[n].tolist() for n in "rgb"] == expected
    assert reconstruct.finite([[1.0, float("inf")], [float("nan")]]) == [[1.0, None], [None]]


@torch.no_grad()
def test_bfloat16_and_single_scenes_stay_near(model, images):
    """Matrices alone are rounded: sums and norms stay float32. The network takes a scene without its batch axis."""
    queries = torch.from_numpy(GOLDEN["query_points"])
    exact = model(images[:1], queries[:1])
    alone = model(images[0], queries[0])
    assert all(torch.equal(value, alone[name]) for name, value in exact.items())
    rounded = small_vggt(heads=("camera", "depth"))
    vggt_heads.lower_precision(rounded.aggregator)
    assert rounded.aggregator.frame_blocks[0].norm1.weight.dtype == torch.float32
    found = rounded(images[:1])
    assert (found["depth"] / exact["depth"]).log().abs().mean() < 0.05
    entries, head = model.aggregator(normalize(images[:1])), model.depth_head
    whole, parts = (vggt_heads.by_frames(head, entries, SIZE, 14, at_once) for at_once in (8, 2))
    assert whole.shape == (1, 3, 2, *SIZE) and (whole - parts).abs().max() < 1e-4
