import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FixedFeatures
from torch import nn

import backbones
import weights
from backbones import BACKBONES, SimplePyramid, build_backbone, build_pyramid
from errors import UserError
from weights import resize_matrix, resize_patch_filters


def single_map(stride=16, channels=8, size=(6, 4)):
    return FixedFeatures([torch.randn(2, channels, *size)], (stride,))


@pytest.mark.parametrize("kind", ["resize", "simple"])
@pytest.mark.parametrize("stride, strides", [(16, (4, 8, 16, 32)), (14, (3.5, 7, 14, 28)), (32, (4, 8, 16, 32))])
def test_a_pyramid_gives_the_strides_that_were_asked_for(kind, stride, strides):
    backbone = single_map(stride)
    backbone.size_divisor = stride
    pyramid = build_pyramid(backbone, kind, (4, 8, 16, 32), 24).eval()
    assert tuple(pyramid.strides) == strides and pyramid.channels == (24,) * 4
    assert backbone.size_divisor == max(stride, strides[-1])
    for level, own in zip(pyramid(backbone(None)), strides):
        assert level.shape == (2, 24, math.ceil(6 * stride / own), math.ceil(4 * stride / own))


def test_a_coarse_level_of_an_odd_map_covers_all_of_it():
    pyramid = build_pyramid(single_map(size=(5, 3)), "simple", (16, 32, 64), 8)
    assert [tuple(level.shape[-2:]) for level in pyramid([torch.zeros(1, 8, 5, 3)])] == [(5, 3), (3, 2), (2, 1)]


def test_levels_come_from_the_nearest_map_and_from_rising_depths():
    hierarchical = FixedFeatures([torch.zeros(1, c, 2, 2) for c in (4, 8, 16, 32)], (4, 8, 16, 32))
    assert SimplePyramid(hierarchical, (8, 16, 32, 64), 8).sources == [1, 2, 3, 3]
    depths = FixedFeatures([torch.zeros(1, 8, 2, 2)] * 4, (16, 16, 16, 16))
    assert SimplePyramid(depths, (4, 8, 16, 32), 8).sources == [0, 1, 2, 3]
    assert SimplePyramid(FixedFeatures([torch.zeros(1, 8, 2, 2)] * 2, (16, 16)), (8, 16, 32, 64), 8).sources == [
        0,
        0,
        1,
        1,
    ]


def test_the_simple_pyramid_is_vitdets():
    """arXiv 2203.16527: transposed convolutions, two for 1/4 with a norm and GELU between them and one for 1/8.

    Max-pooling for 1/32.
    """
    pyramid = SimplePyramid(single_map(channels=16), (4, 8, 16, 32), 8)
    kinds = [[type(m).__name__ for m in level] for level in pyramid.levels]
    ending = ["Conv2d", "ChannelNorm", "Conv2d", "ChannelNorm"]
    assert kinds == [
        ["ConvTranspose2d", "ChannelNorm", "GELU", "ConvTranspose2d", *ending],
        ["ConvTranspose2d", *ending],
        ending,
        ["MaxPool2d", *ending],
    ]
    assert [m.out_channels for m in pyramid.levels[0] if isinstance(m, nn.ConvTranspose2d)] == [8, 4]
    x = torch.randn(2, 16, 3, 3)
    norm = backbones.ChannelNorm(16)
    assert torch.allclose(norm(x), F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2), atol=1e-6)


# Patches of another size


@pytest.mark.parametrize("size", [8, 16, 20])
def test_an_enlarged_patch_gives_what_it_gave_before(size):
    torch.manual_seed(0)
    filters, patch = torch.randn(5, 3, 14, 14, dtype=torch.float64), torch.randn(3, 14, 14, dtype=torch.float64)
    resized = resize_patch_filters(filters, size)
    assert resized.shape == (5, 3, size, size)
    enlarged = F.interpolate(patch[None], (size, size), mode="bicubic", antialias=True)[0]
    before, after = (torch.einsum("ochw,chw->o", f, p) for f, p in ((filters, patch), (resized, enlarged)))
    if size >= 14:
        assert torch.allclose(after, before, atol=1e-9)
    else:  # a smaller patch holds less: the nearest there is
        least_squares = torch.linalg.lstsq(resize_matrix(14, size).T, filters.flatten(2).flatten(0, 1).T).solution.T
        assert torch.allclose(resized.flatten(2).flatten(0, 1), least_squares, atol=1e-8)
    assert resize_patch_filters(filters, 14) is filters


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("size", [8, 16, 32])
def test_resampled_filters_agree_with_timms(size):
    from timm.layers.patch_embed import resample_patch_embed

    filters = torch.randn(6, 3, 14, 14)
    assert torch.allclose(resize_patch_filters(filters, size), resample_patch_embed(filters, [size, size]), atol=1e-5)


def test_resampled_features_are_nearest_to_the_originals(tmp_path):
    """Of a random image enlarged with its patches: by pseudo-inverse far nearer than bicubically or without any."""
    torch.manual_seed(0)
    original = build_backbone("dinov2-small").eval()
    original.model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 14 * 6, 14 * 8)
    enlarged = F.interpolate(images, (16 * 6, 16 * 8), mode="bicubic", antialias=True)
    away = {}
    with torch.no_grad():
        wanted = original(images)[0]
        for method in ("pinv", "bicubic", "crop"):
            backbone = build_backbone("dinov2-small", tmp_path, patch_size=16, patch_resize=method).eval()
            assert backbone.strides == (16,) and backbone.size_divisor == 16
            away[method] = float((backbone(enlarged)[0] - wanted).norm() / wanted.norm())
    assert away["pinv"] < 0.05 and away["pinv"] < 0.2 * min(away["bicubic"], away["crop"])


def test_patch_size_and_layers_are_for_plain_vits():
    for options, message in (
        ({"patch_size": 14}, "--patch-size: for plain"),
        ({"layers": (0,)}, "--layers: for plain"),
    ):
        with pytest.raises(UserError, match=message):
            build_backbone("ecvit-nano", **options)
    with pytest.raises(UserError, match="blocks of dinov3-vits16 are 0 to 11"):
        build_backbone("dinov3-vits16", layers=(3, 12))
    with pytest.raises(UserError, match="--layers all: the blocks of dinov3-vits16 are 0 to 11"):  # a name of VGGT's
        build_backbone("dinov3-vits16", layers=backbones.parse_layers("all"))
    with pytest.raises(UserError, match="--layers takes blocks"):
        backbones.parse_layers("1;2")


# The other extractors


@pytest.mark.parametrize("name", ["dinov2-small", "dinov3-vits16", "clip-vitb16", "mae-vitb16", "mum-vitl16"])
def test_layers_give_the_maps_of_those_blocks_by_name(name, tiny_specs):
    torch.manual_seed(0)
    backbone = build_backbone(f"tiny-{name}", layers=(0, 2)).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, features = backbone(images), backbone.forward_features(images, layers=(0, 2))
    assert backbone.channels == (32, 32) and backbone.strides == (backbone.patch,) * 2
    for m, key in zip(maps, ("block0", "block2")):
        assert torch.equal(m.flatten(2).transpose(1, 2), features[key])
    assert torch.equal(features["block2"], features["x_norm_patchtokens"]) and not torch.equal(
        features["block0"], features["block2"]
    )
    assert torch.equal(features["x_norm"][:, 0], features["x_norm_clstoken"])


@pytest.fixture
def tiny_specs(monkeypatch):
    from dataclasses import replace

    for name in ("dinov2-small", "dinov3-vits16", "clip-vitb16", "mae-vitb16", "mum-vitl16", "vggt-vitl14"):
        monkeypatch.setitem(BACKBONES, f"tiny-{name}", replace(BACKBONES[name], width=32, depth=3, heads=2, ffn=128))


def test_clip_is_transformers_clip_on_clips_own_statistics(tiny_specs):
    torch.manual_seed(0)
    backbone = build_backbone("tiny-clip-vitb16").eval()
    pixels = torch.rand(1, 3, 224, 224)
    ours, theirs = (
        (pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
        for m, s in (
            (backbones.MEAN, backbones.STD),
            (transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD),
        )
    )
    with torch.no_grad():
        expected = backbone.model(theirs)
        features = backbone.forward_features(ours)
    assert torch.allclose(features["x_norm_clstoken"], expected.pooler_output, atol=1e-5)


def test_mae_masks_nothing_and_keeps_the_patches_in_order(tiny_specs):
    torch.manual_seed(0)
    backbone = build_backbone("tiny-mae-vitb16").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first, again = backbone(images)[0], backbone(images)[0]
        images[:, :, 32:48, 80:] += 1  # the patch in the third row and last column
        changed = backbone(images)[0]
    assert torch.equal(first, again)
    assert (changed - first).abs().sum(1)[0].argmax() == 2 * 6 + 5


def test_a_repository_with_more_than_the_backbone_loads_and_says_so(tiny_specs, tmp_path, capsys):
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(small, vocab_size=50, eos_token_id=1, bos_token_id=0, pad_token_id=0),
            vision_config=dict(small, patch_size=16),
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    backbone = build_backbone("tiny-clip-vitb16", tmp_path / "clip").eval()
    assert "not the backbone's and are left out: " in (said := capsys.readouterr().out) and "text_model" in said
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(clip.vision_model(images).last_hidden_state, backbone.model(images).last_hidden_state)
    mae = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **small, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
        )
    )
    mae.save_pretrained(tmp_path / "mae")
    backbone = build_backbone("tiny-mae-vitb16", tmp_path / "mae")
    assert "decoder" in capsys.readouterr().out
    assert torch.equal(mae.vit.embeddings.cls_token, backbone.model.embeddings.cls_token)
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    (tmp_path / "mae" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(UserError, match="hidden_size is 48"):
        build_backbone("tiny-mae-vitb16", tmp_path / "mae")


def original_vit(prefix="", registers=(), position=True, width=32, depth=3, patch=16, grid=14, scale=False, mask=True):
    """The state dict of a ViT as its authors save it."""
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    shapes |= {name: (1, 4, width) for name in registers}
    shapes |= {"pos_embed": (1, 1 + grid * grid, width)} if position else {}
    shapes |= {"mask_token": (1, width)} if mask else {}
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= {
            b + "norm1.weight": (width,),
            b + "norm1.bias": (width,),
            b + "norm2.weight": (width,),
            b + "norm2.bias": (width,),
        }
        shapes |= {
            b + "attn.qkv.weight": (3 * width, width),
            b + "attn.qkv.bias": (3 * width,),
            b + "attn.proj.weight": (width, width),
            b + "attn.proj.bias": (width,),
        }
        shapes |= {
            b + "mlp.fc1.weight": (128, width),
            b + "mlp.fc1.bias": (128,),
            b + "mlp.fc2.weight": (width, 128),
            b + "mlp.fc2.bias": (width,),
        }
        shapes |= {b + "ls1.gamma": (width,), b + "ls2.gamma": (width,)} if scale else {}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {prefix + name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def attention_of(state, block, x, heads=2):
    """Plain attention and MLP of a pre-norm block by its original weights, x (N, C), without positions."""

    def get(name):
        return state[f"blocks.{block}.{name}"]

    y = F.layer_norm(x, x.shape[-1:], get("norm1.weight"), get("norm1.bias"), 1e-5)
    q, k, v = (
        F.linear(y, get("attn.qkv.weight"), get("attn.qkv.bias")).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
    )
    x = x + F.linear(
        F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1),
        get("attn.proj.weight"),
        get("attn.proj.bias"),
    )
    y = F.layer_norm(x, x.shape[-1:], get("norm2.weight"), get("norm2.bias"), 1e-5)
    return x + F.linear(
        F.gelu(F.linear(y, get("mlp.fc1.weight"), get("mlp.fc1.bias"))), get("mlp.fc2.weight"), get("mlp.fc2.bias")
    )


def test_the_authors_own_files_load(tiny_specs, tmp_path, capsys):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)  # one patch: in its middle the rotary positions are all zero

    mum = original_vit(position=False, mask=False)
    torch.save(mum | {"rope_embed.periods": 100 ** (torch.arange(4) / 4)}, tmp_path / "mum.pth")
    backbone = build_backbone("tiny-mum-vitl16", tmp_path / "mum.pth").eval()
    x = torch.stack(
        [mum["cls_token"][0, 0], (mum["patch_embed.proj.weight"] * image).sum((1, 2, 3)) + mum["patch_embed.proj.bias"]]
    )
    for block in range(3):
        x = attention_of(mum, block, x)
    x = F.layer_norm(x, (32,), mum["norm.weight"], mum["norm.bias"], 1e-5)
    assert torch.allclose(backbone.forward_features(image)["x_norm"][0], x, atol=1e-4)
    torch.save(mum | {"rope_embed.periods": torch.arange(4.0)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="rotary periods"):
        build_backbone("tiny-mum-vitl16", tmp_path / "wrong.pth")
    torch.save({"something": torch.zeros(3)}, tmp_path / "wrong.pth")
    for name in ("tiny-mum-vitl16", "tiny-mae-vitb16", "tiny-vggt-vitl14"):
        with pytest.raises(UserError, match=f"not the weights of {name}"):
            build_backbone(name, tmp_path / "wrong.pth")
    torch.save(
        mum | {"decoder_norm.weight": torch.zeros(8), "mask_token": torch.zeros(1, 1, 8)}, tmp_path / "whole.pth"
    )
    build_backbone("tiny-mum-vitl16", tmp_path / "whole.pth")
    assert "2 weights are the decoder's and are left out" in capsys.readouterr().out

    mae = original_vit(mask=False)
    torch.save({"model": mae}, tmp_path / "mae.pth")
    backbone = build_backbone("tiny-mae-vitb16", tmp_path / "mae.pth").eval()
    image = torch.randn(1, 3, 224, 224)
    x = F.conv2d(image, mae["patch_embed.proj.weight"], mae["patch_embed.proj.bias"], stride=16)[0].flatten(1).T
    x = torch.cat([mae["cls_token"][0], x]) + mae["pos_embed"][0]
    for block in range(3):
        x = attention_of(mae, block, x)
    x = F.layer_norm(x, (32,), mae["norm.weight"], mae["norm.bias"])
    assert torch.allclose(backbone.forward_features(image)["x_norm"][0], x, atol=1e-3)

    vggt = original_vit(registers=["register_tokens"], patch=14, grid=37, scale=True)
    torch.save(
        {f"aggregator.patch_embed.{key}": value for key, value in vggt.items()}
        | {"camera_head.weight": torch.zeros(3)},
        tmp_path / "vggt.pth",
    )
    backbone = build_backbone("tiny-vggt-vitl14", tmp_path / "vggt.pth").eval()
    assert "VGGT's patch encoder are used, 1 others left out" in capsys.readouterr().out
    assert torch.equal(backbone.model.embeddings.register_tokens, vggt["register_tokens"])
    assert torch.isfinite(backbone(torch.randn(1, 3, 28, 42))[0]).all()
    del vggt["blocks.1.mlp.fc1.weight"]
    torch.save({f"aggregator.patch_embed.{key}": value for key, value in vggt.items()}, tmp_path / "vggt.pth")
    with pytest.raises(UserError, match="1 missing"):
        build_backbone("tiny-vggt-vitl14", tmp_path / "vggt.pth")


def test_a_file_where_only_a_folder_will_do(tiny_specs, tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "clip.pth")
    with pytest.raises(UserError, match="takes a Hugging Face folder"):
        build_backbone("tiny-clip-vitb16", tmp_path / "clip.pth")
    assert weights.CONVERSIONS.keys() == {"dinov2", "dinov3", "convnext", "mum", "mae"}
