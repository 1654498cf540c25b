"""The other baselines that the paper scales (section 5.1, Table 3): MobileNetV1, MobileNetV2 and ResNet-50.

Rows: Howard et al. 2017, Table 1; Sandler et al. 2018, Table 2; He et al. 2016, Table 1. Built as in torchvision and
timm, to the unit. Their own papers train them without stochastic depth, and so do we where nothing else is asked for.

Departure: MobileNetV1's layers of one width are one stage, as its blocks of stride 2 begin the stages here.
"""

from __future__ import annotations

from effnet.arch.spec import NetworkSpec, StageSpec

BASELINES = {
    network.name: network
    for network in (
        NetworkSpec(
            "mobilenetv1",
            (
                # expand_ratio, kernel_size, stride, channels, layers, op
                StageSpec(1, 3, 1, 64, 1, "separable"),
                StageSpec(1, 3, 2, 128, 2, "separable"),
                StageSpec(1, 3, 2, 256, 2, "separable"),
                StageSpec(1, 3, 2, 512, 6, "separable"),
                StageSpec(1, 3, 2, 1024, 2, "separable"),
            ),
            dropout=0.001,  # the official code's keep probability is .999
            drop_connect=0.0,
            activation="relu6",
            stem=32,
            head=0,
        ),
        NetworkSpec(
            "mobilenetv2",
            (
                # expand_ratio, kernel_size, stride, channels, layers
                StageSpec(1, 3, 1, 16, 1),
                StageSpec(6, 3, 2, 24, 2),
                StageSpec(6, 3, 2, 32, 3),
                StageSpec(6, 3, 2, 64, 4),
                StageSpec(6, 3, 1, 96, 3),
                StageSpec(6, 3, 2, 160, 3),
                StageSpec(6, 3, 1, 320, 1),
            ),
            drop_connect=0.0,
            activation="relu6",
            squeeze_ratio=0.0,
            stem=32,
            head=1280,
        ),
        NetworkSpec(
            "resnet50",
            (
                # expand_ratio, kernel_size, stride, channels, layers, op
                StageSpec(4, 3, 1, 256, 3, "bottleneck"),
                StageSpec(4, 3, 2, 512, 4, "bottleneck"),
                StageSpec(4, 3, 2, 1024, 6, "bottleneck"),
                StageSpec(4, 3, 2, 2048, 3, "bottleneck"),
            ),
            dropout=0.0,
            drop_connect=0.0,
            activation="relu",
            stem=64,
            head=0,
            stem_kernel=7,
            stem_pool=True,
        ),
    )
}
