import ecvit
def build_backbone(name, weights=None):
    m = ecvit.ECViT(**ecvit.CONFIGS[name]); m.name=name; m.size_divisor=32
    return m
