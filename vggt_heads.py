"""VGGT's heads (arXiv 2503.11651): cameras, depth, points and tracks; and the whole network.

B scenes, S frames, (H, W) the images' size in pixels, (h, w) in patches, N = h * w, T tracked points. Cameras follow
OpenCV: x to the right, y down, z forwards; extrinsics (3, 4) map points of the world, which is the first camera's
frame, to those of a camera.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vggt import SMALL, SPECIAL, VGGT_1B, Block, Mlp, build_aggregator, normalize

ENTRIES = 4, 11, 17, 23  # the pairs of blocks that dense heads read
ITERATIONS = 4  # of the camera head and of the tracker

# Cameras


class CameraHead(nn.Module):
    """Refines a pose code (B, S, 9) from the frames' camera tokens: translation, quaternion, field of view."""

    def __init__(self, dim, heads=16, depth=4):
        super().__init__()
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, 9)

    def forward(self, tokens):
        """tokens (B, S, P, 2C) of the last pair -> [pose code after each iteration], see pose_to_cameras."""
        x = self.token_norm(tokens[:, :, 0])
        code, codes = None, []
        for _ in range(ITERATIONS):
            before = self.empty_pose_tokens.expand(*x.shape[:2], -1) if code is None else code.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(before)).chunk(3, dim=-1)
            y = x + gate * (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
            for block in self.trunk:
                y = block(y)
            change = self.pose_branch(self.trunk_norm(y))
            code = change if code is None else code + change
            codes.append(torch.cat([code[..., :7], code[..., 7:].relu()], dim=-1))
        return codes


def pose_to_cameras(code, size):
    """code (..., 9): translation, quaternion (x, y, z, w), vertical and horizontal field of view in radians; size:
    (H, W) of the images -> extrinsics (..., 3, 4), intrinsics (..., 3, 3). A field of view of 0 gives infinity."""
    height, width = size
    extrinsics = torch.cat([quaternion_to_matrix(code[..., 3:7]), code[..., :3, None]], dim=-1)
    focal = torch.stack([width / 2 / (code[..., 8] / 2).tan(), height / 2 / (code[..., 7] / 2).tan()], dim=-1)
    intrinsics = torch.zeros(*code.shape[:-1], 3, 3, dtype=code.dtype, device=code.device)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = focal.unbind(-1)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1
    return extrinsics, intrinsics


def cameras_to_pose(extrinsics, intrinsics, size):
    """The inverse of pose_to_cameras; quaternions get a real part that is not negative."""
    height, width = size
    vertical = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    horizontal = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, torch.stack([vertical, horizontal], dim=-1)], dim=-1)


def quaternion_to_matrix(q):
    """q (..., 4) as x, y, z, w, of any length -> rotations (..., 3, 3)."""
    x, y, z, w = q.unbind(-1)
    twice = 2 / q.square().sum(-1)
    rows = [
        [1 - twice * (y * y + z * z), twice * (x * y - z * w), twice * (x * z + y * w)],
        [twice * (x * y + z * w), 1 - twice * (x * x + z * z), twice * (y * z - x * w)],
        [twice * (x * z - y * w), twice * (y * z + x * w), 1 - twice * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def matrix_to_quaternion(r):
    """r (..., 3, 3), rotations -> (..., 4) as x, y, z, w with w >= 0.

    Four formulas divide by one component each; the one that divides by the largest is used.
    """
    squares = torch.stack(  # four times the square of x, y, z, w
        [
            1 + r[..., 0, 0] - r[..., 1, 1] - r[..., 2, 2],
            1 - r[..., 0, 0] + r[..., 1, 1] - r[..., 2, 2],
            1 - r[..., 0, 0] - r[..., 1, 1] + r[..., 2, 2],
            1 + r[..., 0, 0] + r[..., 1, 1] + r[..., 2, 2],
        ],
        dim=-1,
    )
    xy, xz, yz = (r[..., i, j] + r[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    xw, yw, zw = (r[..., i, j] - r[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    products = torch.stack(  # four times each product of two components
        [
            torch.stack([squares[..., 0], xy, xz, xw], dim=-1),
            torch.stack([xy, squares[..., 1], yz, yw], dim=-1),
            torch.stack([xz, yz, squares[..., 2], zw], dim=-1),
            torch.stack([xw, yw, zw, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = products.gather(-2, largest).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q)


def unproject(depth, extrinsics, intrinsics):
    """depth (..., H, W), extrinsics (..., 3, 4), intrinsics (..., 3, 3) -> points of the world (..., H, W, 3)."""
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype, device=depth.device),
        torch.arange(width, dtype=depth.dtype, device=depth.device),
        indexing="ij",
    )
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera = torch.stack([(u - cx) * depth / fx, (v - cy) * depth / fy, depth], dim=-1)
    rotation, translation = extrinsics[..., :3], extrinsics[..., None, None, :, 3]
    return (camera - translation) @ rotation[..., None, :, :]  # from the right: the transposed rotation


# Dense heads


class ResidualUnit(nn.Module):
    """Two convolutions. As the reference rectifies in place, the skip carries the rectified input, other than in the
    paper of DPT."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


class Fusion(nn.Module):
    """Adds a level to what comes from below, and resizes the sum."""

    def __init__(self, dim, is_lowest):
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        self.resConfUnit1 = None if is_lowest else ResidualUnit(dim)
        self.resConfUnit2 = ResidualUnit(dim)

    def forward(self, level, below, size):
        if below is not None:
            level = below + self.resConfUnit1(level)
        return self.out_conv(resize(self.resConfUnit2(level), size))


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class Scratch(nn.Module):
    def __init__(self, widths, dim, out):
        super().__init__()
        for i, width in enumerate(widths, 1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(width, dim, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", Fusion(dim, is_lowest=i == 4))
        self.output_conv1 = nn.Conv2d(dim, dim // 2 if out else dim, 3, padding=1)
        if out:
            self.output_conv2 = nn.Sequential(nn.Conv2d(dim // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, out, 1))


class DPTHead(nn.Module):
    """DPT (arXiv 2103.13413) on four pairs of the aggregator -> maps (B * S, out, H, W), or, with out=0, features
    (B * S, dim, h * p / 2, w * p / 2) without positions."""

    def __init__(self, dim_in, dim=256, widths=(256, 512, 1024, 1024), out=0, entries=ENTRIES):
        super().__init__()
        self.out, self.entries = out, tuple(entries)
        self.norm = nn.LayerNorm(dim_in)
        self.projects = nn.ModuleList(nn.Conv2d(dim_in, width, 1) for width in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, 4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, 2, padding=1),
            ]
        )
        self.scratch = Scratch(widths, dim, out)

    def forward(self, entries, size, patch):
        """entries {pair: (B, S, P, 2C)}; size: (H, W) of the images."""
        levels = []
        for entry, project, resize_layer in zip(self.entries, self.projects, self.resize_layers):
            tokens = entries[entry].flatten(0, 1)[:, SPECIAL:]
            level = self.norm(tokens).transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))
            levels.append(resize_layer(self.with_positions(project(level), size)))
        s = self.scratch
        levels = [getattr(s, f"layer{i}_rn")(level) for i, level in enumerate(levels, 1)]
        sizes = [tuple(2 * n for n in levels[0].shape[-2:])] + [level.shape[-2:] for level in levels]
        x = None
        for i in (4, 3, 2, 1):
            x = getattr(s, f"refinenet{i}")(levels[i - 1], x, sizes[i - 1])
        x = s.output_conv1(x)
        if not self.out:
            return resize(x, (size[0] // 2, size[1] // 2))
        return s.output_conv2(self.with_positions(resize(x, size), size))

    def with_positions(self, x, size):
        if not self.out:
            return x
        return x + 0.1 * position_map(x.shape[1], *x.shape[-2:], size[1] / size[0], x.device)


def position_map(channels, m, n, aspect, device=None):
    """-> (channels, m, n), sines and cosines of x, then of y, in units of the image's half diagonal."""
    diagonal = math.hypot(aspect, 1)
    x = torch.linspace(-1, 1, n, device=device) * (aspect / diagonal * (n - 1) / n)
    y = torch.linspace(-1, 1, m, device=device) * ((m - 1) / m / diagonal)
    x, y = sines(x, channels // 2, 100), sines(y, channels // 2, 100)
    return torch.cat([x[:, None].expand(-1, m, -1), y[:, :, None].expand(-1, -1, n)])


def sines(positions, channels, temperature):
    """positions (n,) -> (channels, n), sines, then cosines."""
    count = channels // 2
    frequencies = temperature ** -(torch.arange(count, dtype=torch.float64) / count)
    angles = frequencies[:, None] * positions.cpu().double()  # Apple's GPUs have no float64
    return torch.cat([angles.sin(), angles.cos()]).float().to(positions.device)


def activate(x, kind):
    """x (..., out, H, W) -> values (..., H, W, out - 1), confidence (..., H, W), over 1; kind: "depth" or "points"."""
    values, confidence = x.movedim(-3, -1).split([x.shape[-3] - 1, 1], dim=-1)
    values = values.exp() if kind == "depth" else values.sign() * values.abs().expm1()
    return values, 1 + confidence[..., 0].exp()


# Tracks


def sample(maps, points, padding):
    """maps (B, C, m, n), points (B, K, 2), x and y in pixels, 0 the centre of the first -> (B, C, K)."""
    m, n = maps.shape[-2:]
    scale = points.new_tensor([2 / max(n - 1, 1), 2 / max(m - 1, 1)])
    grid = (points * scale - 1)[:, None]
    return F.grid_sample(maps, grid, align_corners=True, padding_mode=padding)[:, :, 0]


class CrossBlock(nn.Module):
    """A block of the update transformer, whose residual starts from the normalised input; with a context, attention is
    to that."""

    def __init__(self, dim, heads=8, has_context=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if has_context else None
        attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.add_module("cross_attn" if has_context else "attn", attention)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, context=None):
        x = self.norm1(x)
        if self.norm_context is None:
            attended = self.attn(x, x, x, need_weights=False)[0]
        else:
            context = self.norm_context(context)
            attended = self.cross_attn(x, context, context, need_weights=False)[0]
        x = x + attended
        return x + self.mlp(self.norm2(x))


class UpdateTransformer(nn.Module):
    """Tokens of points in frames (B, T, S, dim_in) -> updates (B, T, S, dim_out); learned tracks carry what points tell
    each other."""

    def __init__(self, dim_in, dim, dim_out, depth=6, learned=64):
        super().__init__()
        self.virual_tracks = nn.Parameter(torch.randn(1, learned, 1, dim))  # so called in the released file
        self.input_norm, self.output_norm = nn.LayerNorm(dim_in), nn.LayerNorm(dim)
        self.input_transform, self.flow_head = nn.Linear(dim_in, dim), nn.Linear(dim, dim_out)
        self.time_blocks = nn.ModuleList(CrossBlock(dim) for _ in range(depth))
        self.space_virtual_blocks = nn.ModuleList(CrossBlock(dim) for _ in range(depth))
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(dim, has_context=True) for _ in range(depth))
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(dim, has_context=True) for _ in range(depth))

    def forward(self, tokens):
        first = self.input_transform(self.input_norm(tokens))
        batch, count, frames, _ = first.shape
        learned = self.virual_tracks.expand(batch, -1, frames, -1)
        x = torch.cat([first, learned], dim=1)
        blocks = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
        )
        for in_time, from_points, among_learned, to_points in blocks:
            x = in_time(x.flatten(0, 1)).unflatten(0, (batch, -1))
            in_frames = x.transpose(1, 2).flatten(0, 1)  # (B * S, T + learned, dim)
            points, learned = in_frames[:, :count], in_frames[:, count:]
            learned = among_learned(from_points(learned, points))
            points = to_points(points, learned)
            x = torch.cat([points, learned], dim=1).unflatten(0, (batch, frames)).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :count] + first))


class Tracker(nn.Module):
    """Follows points of the first frame through all others by their correlation with the maps (CoTracker)."""

    RADIUS = 4

    def __init__(self, dim=128, hidden=384, levels=7, depth=6):
        super().__init__()
        self.levels, self.dim = levels, dim
        width = 3 * dim + 4
        self.query_ref_token = nn.Parameter(SMALL * torch.randn(1, 2, width))
        self.corr_mlp = Mlp(levels * (2 * self.RADIUS + 1) ** 2, hidden, dim)
        self.updateformer = UpdateTransformer(width, hidden, dim + 2, depth)
        self.fmap_norm, self.ffeat_norm = nn.LayerNorm(dim), nn.GroupNorm(1, dim)
        self.ffeat_updater = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.vis_predictor, self.conf_predictor = nn.Sequential(nn.Linear(dim, 1)), nn.Sequential(nn.Linear(dim, 1))

    def forward(self, maps, queries):
        """maps (B, S, dim, m, n), queries (B, T, 2) in their pixels -> [coordinates (B, S, T, 2) after each iteration],
        visibility and confidence (B, S, T)."""
        batch, frames = maps.shape[:2]
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        pyramid = build_pyramid(maps, self.levels)
        width = 3 * self.dim + 4
        places = place_map(width, *maps.shape[-2:], maps.device).expand(batch, -1, -1, -1)
        places = sample(places, queries, "border").transpose(1, 2)[:, :, None]  # (B, T, 1, width)
        reference = self.query_ref_token[:, [0] + [1] * (frames - 1)][:, None]
        coordinates = queries[:, None].expand(-1, frames, -1, -1)
        features = sample(maps[:, 0], queries, "border").transpose(1, 2)[:, None].expand(-1, frames, -1, -1)
        found = []
        for _ in range(ITERATIONS):
            coordinates = coordinates.detach()
            correlation = self.corr_mlp(correlate(pyramid, features, coordinates, self.RADIUS))  # (B, S, T, dim)
            motion = motion_code((coordinates - coordinates[:, :1]), self.dim)
            tokens = torch.cat([motion, correlation, features], dim=-1).transpose(1, 2)
            update = self.updateformer(tokens + places + reference).transpose(1, 2)
            coordinates = coordinates + update[..., :2]
            change = self.ffeat_norm(update[..., 2:].flatten(0, 2)).unflatten(0, update.shape[:3])
            features = features + self.ffeat_updater(change)
            coordinates = torch.cat([queries[:, None], coordinates[:, 1:]], dim=1)
            found.append(coordinates)
        visible, confident = (p(features)[..., 0].sigmoid() for p in (self.vis_predictor, self.conf_predictor))
        return found, visible, confident


def build_pyramid(maps, levels):
    """maps (B, S, C, m, n) -> [them, then averages of two by two pixels of the level before]."""
    pyramid = [maps]
    for _ in range(levels - 1):
        last = pyramid[-1]
        pyramid.append(F.avg_pool2d(last.flatten(0, 1), 2).unflatten(0, last.shape[:2]))
    return pyramid


def correlate(pyramid, features, coordinates, radius):
    """features (B, S, T, C), coordinates (B, S, T, 2) -> (B, S, T, levels * (2 radius + 1)^2): correlations around the
    coordinates on each level. The offset in x is the outer one."""
    side = torch.arange(-radius, radius + 1, dtype=coordinates.dtype, device=coordinates.device)
    window = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).flatten(0, 1)  # dx, dy
    batch, frames, count = coordinates.shape[:3]
    features = features / math.sqrt(features.shape[-1])
    results = []
    for level, maps in enumerate(pyramid):
        volume = torch.einsum("bstc,bscmn->bstmn", features, maps)
        points = coordinates[..., None, :] / 2**level + window
        found = sample(volume.flatten(0, 2)[:, None], points.flatten(0, 2), "zeros")
        results.append(found.reshape(batch, frames, count, -1))
    return torch.cat(results, dim=-1)


def motion_code(motion, channels):
    """motion (..., 2) in pixels -> (..., channels + 4)."""
    half = channels // 2
    frequencies = torch.arange(0, half, 2, dtype=motion.dtype, device=motion.device) * (1000 / half)
    angles = motion[..., None] * frequencies  # (..., 2, half / 2)
    code = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
    return torch.cat([code, motion / 518, motion / 518], dim=-1)


def place_map(channels, m, n, device=None):
    """-> (1, channels, m, n): half for the column, half for the row; of each sines, then cosines."""
    x = sines(torch.arange(n, device=device), channels // 2, 10000)
    y = sines(torch.arange(m, device=device), channels // 2, 10000)
    return torch.cat([x[:, None].expand(-1, m, -1), y[:, :, None].expand(-1, -1, n)])[None]


class TrackHead(nn.Module):
    def __init__(self, dim_in, dim=128, hidden=384, levels=7, widths=(256, 512, 1024, 1024), entries=ENTRIES):
        super().__init__()
        self.feature_extractor = DPTHead(dim_in, dim, widths, 0, entries)
        self.tracker = Tracker(dim, hidden, levels)

    def forward(self, entries, size, patch, queries):
        """queries (B, T, 2) in pixels of the first frame -> as Tracker, in pixels of the images."""
        smallest = 2 ** (self.tracker.levels - 1)
        if min(size) // 2 < smallest:
            raise ValueError(f"tracks need images of {2 * smallest} pixels or more, not {size[0]}x{size[1]}")
        maps = by_frames(self.feature_extractor, entries, size, patch)
        found, visible, confident = self.tracker(maps, queries / 2)
        return [2 * coordinates for coordinates in found], visible, confident


def by_frames(head, entries, size, patch, at_once=8):
    """Frames are independent of each other here; a few at a time bound the memory -> (B, S, out, H, W)."""
    frames = next(iter(entries.values())).shape[1]
    parts = []
    for start in range(0, frames, at_once):
        part = {i: entries[i][:, start : start + at_once] for i in head.entries}
        parts.append(head(part, size, patch).unflatten(0, (-1, min(at_once, frames - start))))
    return torch.cat(parts, dim=1)


# The whole network


def lower_precision(aggregator):
    """Its matrices become bfloat16, in half of the memory; sums and norms stay float32."""
    for module in aggregator.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)


class VGGT(nn.Module):
    """Images of a scene -> its cameras, depth, points and tracks.

    heads: those that are built, of "camera", "depth", "point", "track"; encoder: see vggt.build_aggregator. The other
    arguments are VGGT-1B's.
    """

    def __init__(
        self,
        heads=("camera", "depth", "point", "track"),
        encoder=None,
        dims=VGGT_1B,
        entries=ENTRIES,
        camera=None,
        dpt=None,
        track=None,
    ):
        super().__init__()
        self.aggregator = build_aggregator(**dims, encoder=encoder)
        width = 2 * dims["dim"]
        self.last = dims["pairs"] - 1
        self.entries = tuple(entries)
        self.camera_head = CameraHead(width, **camera or {}) if "camera" in heads else None
        self.point_head = DPTHead(width, out=4, entries=entries, **dpt or {}) if "point" in heads else None
        self.depth_head = DPTHead(width, out=2, entries=entries, **dpt or {}) if "depth" in heads else None
        self.track_head = TrackHead(width, entries=entries, **track or {}) if "track" in heads else None

    def forward(self, images, queries=None):
        """images (B, S, 3, H, W) in [0, 1], sides multiples of the patch; queries (B, T, 2): points of the first frame
        to track, x and y in pixels; both without B for one scene, which the results have all the same. After
        `lower_precision` the aggregator computes in bfloat16; the heads compute in float32.

        -> "pose" (B, S, 9), "depth" (B, S, H, W), "depth_confidence", "points" (B, S, H, W, 3), "points_confidence",
        and with queries "tracks" (B, S, T, 2), "visibility", "confidence" (B, S, T), as far as there are heads.
        """
        images = images if images.ndim == 5 else images[None]
        queries = queries[None] if queries is not None and queries.ndim == 2 else queries
        size, patch = images.shape[-2:], self.aggregator.patch
        precision = self.aggregator.frame_blocks[0].mlp.fc1.weight.dtype
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            entries = self.aggregator(normalize(images), keep={*self.entries, self.last})
        entries = {i: tokens.float() for i, tokens in entries.items()}
        found = {}
        if self.camera_head:
            found["pose"] = self.camera_head(entries[self.last])[-1]
        for name, head in (("depth", self.depth_head), ("points", self.point_head)):
            if head:
                values, confidence = activate(by_frames(head, entries, size, patch), name)
                found[name] = values[..., 0] if name == "depth" else values
                found[f"{name}_confidence"] = confidence
        if self.track_head and queries is not None:
            tracks, found["visibility"], found["confidence"] = self.track_head(entries, size, patch, queries)
            found["tracks"] = tracks[-1]
        return found
