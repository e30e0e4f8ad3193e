"""The schema of all settings. Unknown keys are errors; units are part of the names.

`Config` contains all settings of a run; `configs.load` reads it from YAML.

The default of every block is its class called without arguments, so that setting one value in a block changes no other
value. A block whose defaults differ from those of its class (`joint.sequence`) therefore has a class of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from configs.encoder_spec import own_preprocess
from configs.head_settings import HeadConfig, LstmHead
from configs.head_settings import HeadSettings as HeadSettings  # where plug-ins of earlier versions import it from
from configs.strict import OmitsDefaults, Strict

MAIN_TRACK = "phases"  # the label track that every data set has
MAX_FPS = 10_000.0  # cameras with 1,000 frames per second exist; rates above this limit come from damaged files
# The folder of a stage in a run is called like the section of its settings.
CNN_FOLDER, EXTRACT_FOLDER, TEMPORAL_FOLDER, JOINT_FOLDER = "cnn", "extract", "temporal", "joint"
TOOLS_FOLDER = "tools"
DEFAULT_BACKBONE = "resnet50"
Inference = Literal["carried", "clip"]
Precision = Literal["auto", "native", "fp32", "bf16", "fp16"]


class SplitConfig(Strict):
    """Which videos are for training, validation and test.

    `rule` is one of these: numbers or percentages `A/B/C` (train/val/test) or `A/B` (train/test), in the order of the
    video numbers; `lists`, for the lists `train`, `val` and `test` below; `kfold` or `leave_one_out`, which test on
    fold number `fold` and validate on `val_videos` of the other videos; the name of a published split; or `null`, for
    the data set's default.
    """

    rule: str | None = None
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    folds: int = Field(5, ge=2)
    fold: int = Field(0, ge=0)
    val_videos: int = Field(1, ge=0)
    seed: int | None = Field(None, description="seed for shuffling videos before k-fold splitting; null: no shuffling")


def _known_sources(sources: str) -> str:
    if not re.fullmatch(r"auto|(video|frames|tfrecord)(:.+)?", sources):
        raise ValueError("must be auto, video, frames or tfrecord, or a kind and a folder such as frames:FOLDER")
    return sources


class DataConfig(Strict):
    dataset: str = Field("cholec80", description="name in configs/datasets, or the path of a YAML file")
    root: Path | None = Field(None, description="folder of videos and annotations; or set the variable SURGSTAGE_DATA")
    index: Path = Path("artifacts/index.json")
    sources: Annotated[str, AfterValidator(_known_sources)] = Field(
        "auto",
        description="which source to use if the root contains several sources of one video: video, frames, tfrecord, "
        "or KIND:FOLDER to use one folder below the root, such as frames:frames_cutmargin",
    )
    follow_links: bool = Field(False, description="follow symbolic links that lead out of the root")
    fps: float = Field(1.0, gt=0, le=MAX_FPS, description="sampling rate: take the frame on screen every 1/fps seconds")
    split: SplitConfig = SplitConfig()
    tools_between_rows: Literal["mask", "hold"] = Field(
        "mask",
        description="if frames are sampled faster than tools are labelled: give frames between two rows no label "
        "(mask), or the label of the row before (hold)",
    )
    reader: Literal["auto", "decord", "pyav"] = "auto"
    frame_numbering: Literal["auto", "source", "sample"] = Field(
        "auto", description="frame folders: whether the numbers in file names count source frames or samples"
    )
    frame_base: Literal["auto", "first", 0, 1] = Field(
        "auto", description="frame folders: number of a video's first frame; first: the number of each first image"
    )
    folder_fps: float | None = Field(
        None, gt=0, le=MAX_FPS, description="frame folders whose file names count samples: samples per second"
    )
    row_fps: Literal["auto", "source"] | Annotated[float, Field(ge=1e-3, le=MAX_FPS)] = Field(
        "auto",
        description="what the Frame column of annotation files counts: a rate in numbers per second (1: seconds), or "
        "source for the video's own frames; auto: inferred from the lengths of each video and its annotations",
    )
    row_base: Literal["auto", 0, 1] = Field(
        "auto", description="annotation files: the number that stands for the first frame"
    )
    min_labelled: float = Field(
        0.5,
        ge=0,
        le=1,
        description="leave out videos whose phase or tool labels cover less than this fraction of them; 0: none",
    )
    tfrecord_phase_order: str | None = Field(
        None,
        description="TFRecord files: which phase each number means. A name in the data set's phase_orders, a file, or "
        "comma-separated phases. Required to index such files, since they contain no phase names",
    )
    unverified: bool = Field(
        False, description="use a data set whose description has not been checked against its documentation"
    )
    tracks: tuple[str, ...] = Field(
        (MAIN_TRACK,),
        description="the label tracks that stage two learns and recognises side by side: phases, and any of the data "
        "set's additional tracks, such as [phases, steps]",
    )
    full_hash: bool = Field(False, description="hash whole source files, not only their first and last MiB")
    allow_overlap: bool = Field(
        False,
        description="test on operations on which the model was trained, in this or another data set; results are then "
        "too good",
    )
    exclude: dict[str, str] = Field(
        {}, description="videos to leave out: ids or shell patterns, each with a reason; or a list without reasons"
    )

    @field_validator("tracks")
    @classmethod
    def _names_each_track_once(cls, tracks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tracks)) != len(tracks):
            raise ValueError("a track occurs twice")
        if MAIN_TRACK not in tracks:
            raise ValueError(f"the phases are always learned; add {MAIN_TRACK} to the list")
        return tracks

    @field_validator("exclude", mode="before")
    @classmethod
    def _reasons_may_be_left_out(cls, value: Any) -> Any:
        reasons = dict.fromkeys(value, "") if isinstance(value, list | tuple) else value
        if not isinstance(reasons, dict):
            return reasons
        if bare := [str(name) for name, reason in reasons.items() if reason is None]:
            raise ValueError(f"{bare[0]} has no reason; give one, or list the ids without reasons: [{bare[0]}]")
        return {str(name): reason for name, reason in reasons.items()}


_Pixels = Annotated[int, Field(ge=16, le=2048)]


def _explained(size: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Refuse a wrong size in one sentence, since pydantic would explain it once as a number and once as a pair."""
    try:
        return validate(size)
    except ValidationError as error:
        raise ValueError("must be a number of pixels or [height, width], each from 16 to 2048") from error


# the side of a square, or height and width
Size = Annotated[_Pixels | tuple[_Pixels, _Pixels], WrapValidator(_explained)]


def height_width(size: Size) -> tuple[int, int]:
    """Return height and width in pixels of an image of this size."""
    return (size, size) if isinstance(size, int) else size


class PreprocessConfig(OmitsDefaults):
    """How frames are cropped, resized and normalised for the backbone, in the same way in all modes.

    In a `Config`, values that are not given are those of the encoder (`own_preprocess` in `configs.encoder_spec`).
    """

    OMITTED = frozenset({"short_side_px", "interpolation"})

    cut_margin: bool = Field(False, description="cut off the black margin around the endoscope image before resizing")
    resize_px: Size = Field(250, description="side of the square that frames are resized to, or [height, width]")
    crop_px: Size = Field(
        224, description="side of the square that is cut out of the resized frame for the net, or [height, width]"
    )
    short_side_px: _Pixels | None = Field(
        None,
        description="resize frames so that the short side has this length and the aspect is kept, and then cut out the "
        "centre of size resize_px; null: resize to resize_px without keeping the aspect",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="Pillow's filter for resizing")
    mean: tuple[float, float, float] = (0.3456, 0.2281, 0.2233)
    std: tuple[float, float, float] = (0.2528, 0.2135, 0.2104)

    @model_validator(mode="after")
    def _crop_fits(self) -> PreprocessConfig:
        resized = height_width(self.resize_px)
        if any(cut > side for cut, side in zip(height_width(self.crop_px), resized, strict=True)):
            raise ValueError(f"crop_px {size_text(self.crop_px)} is larger than resize_px {size_text(self.resize_px)}")
        if self.short_side_px is not None and self.short_side_px < max(resized):
            raise ValueError(
                f"short_side_px {self.short_side_px} is smaller than resize_px {size_text(self.resize_px)}, which is "
                "cut out of the resized frame"
            )
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


def size_text(size: Size) -> str:
    """Return a size as it is written in settings: `224` or `[224, 399]`."""
    return str(size if isinstance(size, int) else list(size))


class CacheConfig(Strict):
    """The cache of decoded frames on disk. Frames are stored after resizing and before cropping."""

    dir: Path = Path("artifacts/frames")
    codec: Literal["webp", "png", "jpeg"] = Field(
        "webp", description="webp and png are lossless; jpeg saves disk space, but changes features (and their digest)"
    )
    jpeg_quality: int = Field(95, ge=1, le=100)
    use_for_extract: bool = Field(True, description="let extract read the frames that are already in the cache")


class OptimConfig(Strict):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    dampening: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimConfig:
        if self.name == "sgd" and self.nesterov and (self.momentum == 0 or self.dampening > 0):
            raise ValueError("nesterov=true needs momentum above 0 and dampening=0")
        return self

    @property
    def unused(self) -> dict[str, str]:
        """The settings that have no effect, because of the values of others, each with that reason."""
        return {} if self.name == "sgd" else dict.fromkeys(("momentum", "dampening", "nesterov"), f"name={self.name}")


class ScheduleConfig(Strict):
    name: Literal["constant", "step", "plateau", "cosine"] = "constant"
    step_epochs: int = Field(5, ge=1)
    gamma: float = Field(0.1, gt=0, le=1)
    patience_epochs: int = Field(2, ge=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)

    @property
    def unused(self) -> dict[str, str]:
        """The settings that have no effect, because of the values of others, each with that reason."""
        users = {"step_epochs": ("step",), "gamma": ("step", "plateau"), "patience_epochs": ("plateau",)}
        return {key: f"name={self.name}" for key, names in users.items() if self.name not in names}


class LoopConfig(OmitsDefaults):
    """The settings that all training loops have."""

    OMITTED = frozenset({"ema_decay", "keep_epoch"})

    epochs: int = Field(25, ge=1)
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    early_stop_epochs: int | None = Field(None, ge=1, description="stop after this many epochs without a better score")
    grad_clip_norm: float | None = Field(None, gt=0)
    precision: Precision = "auto"
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="last.pt is written after each epoch, and within an epoch after this time"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="validate and keep the exponential moving average of the weights, of which each step keeps this "
        "fraction, fewer at first; null: the weights of the last step",
    )
    keep_epoch: Literal["best", "last"] = Field(
        "best",
        description="best: the epoch with the best score on the validation videos; last: the last one, whatever its "
        "score, so that stage two's decoding is fitted on videos that had no part in the training",
    )

    @model_validator(mode="after")
    def _last_epoch_is_trained(self) -> LoopConfig:
        if self.keep_epoch == "last" and self.early_stop_epochs is not None:
            raise ValueError("early_stop_epochs has no place with keep_epoch=last, which trains every epoch")
        return self


class AugmentConfig(OmitsDefaults):
    """Random changes of training frames, drawn anew in every epoch."""

    OMITTED = frozenset({"scale", "aspect", "hue"})

    crop: Literal["random", "centre"] = "random"
    scale: tuple[float, float] | None = Field(
        None,
        description="cut out windows of a random size and resize them to crop_px: from and to this fraction, such as "
        "[0.5, 1.0], of the largest window with the aspect of crop_px that fits in the resized frame; null: windows of "
        "crop_px",
    )
    aspect: float = Field(
        1.0, ge=1, le=4, description="with scale: stretch windows by a random factor of up to this, in either direction"
    )
    flip: bool = True
    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0, lt=1)
    hue: float = Field(0.0, ge=0, le=0.5, description="shift hues by up to this fraction of the circle of colours")

    @model_validator(mode="after")
    def _windows_are_random(self) -> AugmentConfig:
        if self.scale is None:
            return self
        if not 0.01 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two fractions of an area, from 0.01 to 1, the smaller one first")
        if self.crop == "centre":
            raise ValueError("crop=centre cannot be combined with scale, whose windows lie anywhere in the frame")
        return self


class CnnConfig(LoopConfig):
    """Stage one: training a CNN on single frames."""

    OMITTED = LoopConfig.OMITTED | {"freeze_until", "layer_lr_decay"}

    backbone: str = Field(
        DEFAULT_BACKBONE,
        description="encoder: a torchvision classification net, a name that `encoders list` shows, timm:NAME, or a net "
        "of a plug-in",
    )
    weights: str = Field(
        "imagenet",
        description="published (the encoder's released weights; imagenet means the same) | random | cached (published "
        "if these weights are on this machine, otherwise random) | a file with a state dict | run:NAME (the backbone "
        "of an earlier run)",
    )
    zero_init_residual: bool = Field(
        False, description="ResNets with random weights: let residual branches start at zero (Goyal et al. 2017)"
    )
    phase_head: bool = Field(False, description="also train a head that predicts the phase of single frames")
    phase_loss_weight: float = Field(1.0, gt=0)
    class_weighting: Literal["none", "inverse_frequency"] = "none"
    backbone_lr_factor: float = Field(0.1, ge=0, le=1)
    freeze_batch_norm: bool = Field(
        False, description="keep batch norm's running statistics and affine parameters as they are"
    )
    freeze_until: str | None = Field(
        None,
        description="train-cnn, train-joint: freeze the backbone from the input up to and including this layer, such "
        "as layer2 or blocks.5; null: train all of it",
    )
    layer_lr_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="train-cnn, train-joint: the learning rate of each block of the backbone is that of the block "
        "after it times this factor; 1: all have the same",
    )
    sync_batch_norm: bool = Field(
        False, description="with several processes on CUDA: compute batch norm over the batches of all processes"
    )
    batch_frames: int = Field(64, ge=1)
    accumulate_steps: int = Field(1, ge=1)
    workers: int = Field(
        -1, ge=-1, description="loader processes; -1: none on a CPU, otherwise one less than the cores, at most 16"
    )
    frames_per_epoch: int | None = Field(
        None, ge=1, description="train on a random subset of this many frames in each epoch; null: on all frames"
    )
    augment: AugmentConfig = AugmentConfig()


class ExtractConfig(Strict):
    store: Path = Path("artifacts/features")
    encoder: Literal["finetuned", "initial"] = Field(
        "finetuned",
        description="finetuned: the backbone that the run's train-cnn trained; initial: cnn.weights as it is",
    )
    checkpoint: Path | None = Field(
        None, description="use the backbone of the joint net in this checkpoint (set by `extract --from-joint RUN`)"
    )
    engine: Literal["torch", "openvino"] = Field(
        "torch", description="library that computes the backbone; openvino is faster, on CPUs only, and in the digest"
    )
    precision: Precision | Literal["int8"] = Field(
        "auto",
        description="precision of the forward pass; int8 needs engine=openvino and is calibrated before extraction",
    )
    calibration_frames: int = Field(300, ge=1, description="number of training frames on which int8 is calibrated")
    storage: Literal["float16", "float32"] = "float16"
    batch_frames: int | None = Field(
        None,
        ge=1,
        description="frames per batch, which can change the last bits of features; null: 8 on a CPU, 64 elsewhere",
    )
    workers: int = Field(-1, ge=-1, description="worker processes; -1: one per core, fewer if there are few frames")
    segments: bool = Field(
        True,
        description="split videos between batches, so that several processes can share one; features stay identical",
    )
    segment_frames: int = Field(128, ge=1, description="least number of samples in a part of a split video")
    decode_ahead: Literal["auto", "on", "off"] = Field(
        "auto",
        description="let worker processes decode frames for the process that computes (extract, predict, joint nets); "
        "auto: only if that process computes on a GPU",
    )
    hardware_decoding: str | None = Field(
        None,
        description="PyAV hardware decoder (cuda, qsv, ...); refused unless it gives the same frames as decoding in "
        "software",
    )
    tool_head: bool = Field(
        True,
        description="compute tool logits with the encoder's trained tool head; false leaves them out, for data sets "
        "with other tools",
    )
    compile: bool = Field(False, description="torch.compile the backbone; part of the features' digest")

    @property
    def torch_precision(self) -> Precision:
        """The precision of what torch computes: `precision`, or `auto` for int8, which only OpenVINO supports."""
        return "auto" if self.precision == "int8" else self.precision

    @model_validator(mode="after")
    def _engine_computes_it(self) -> ExtractConfig:
        if self.engine == "torch" and self.precision == "int8":
            raise ValueError("precision: int8 needs engine=openvino")
        if self.engine == "openvino" and self.precision == "fp16":
            raise ValueError("precision: engine=openvino computes fp32, bf16 or int8, not fp16")
        if self.engine == "openvino" and self.compile:
            raise ValueError("compile: torch.compile cannot be combined with engine=openvino")
        return self


class SequenceConfig(Strict):
    """How videos are divided into training sequences. Frames stay in order, and no sequence spans two videos."""

    mode: Literal["full", "chunked", "clips"] = "full"
    frames: int = Field(256, ge=1, description="length of a chunk or clip")
    stride: int = Field(1, ge=1, description="number of samples from the start of a clip to the start of the next")
    batch: int = Field(8, ge=1, description="videos (full, chunked) or clips per step")
    inference: Inference = Field(
        "carried", description="in evaluation: carry the state through the whole video, or reset it at each clip"
    )

    @property
    def unused(self) -> dict[str, str]:
        """The settings that have no effect, because of the values of others, each with that reason."""
        no_clips = {} if self.mode == "clips" else {"stride": f"mode={self.mode}"}
        whole = self.mode == "full" and self.inference == "carried"
        return no_clips | ({"frames": "mode=full and inference=carried"} if whole else {})


FeaturesIn = Literal["auto", "memory", "stream"]
DecodingMode = Literal["none", "calibrated", "filter", "causal", "offline"]


class DecodingConfig(OmitsDefaults):
    """How `evaluate` and `predict` decode the probabilities of stage two (docs/decoding.md); no part of a training."""

    OMITTED = frozenset({"tool_smoothing_s"})

    mode: DecodingMode = Field(
        "none",
        description="none: the most probable class of each frame; calibrated: the same, with probabilities scaled by a "
        "temperature; filter: the most probable class given this and earlier frames and the transitions in training "
        "labels; causal: the same by Viterbi, with minimum durations and a lag; offline: Viterbi over whole videos",
    )
    lag_s: float = Field(
        0.0, ge=0, le=60, description="mode=causal: decide a frame only when this much of what follows has been seen"
    )
    min_duration_s: float | None = Field(
        None,
        ge=0,
        le=600,
        description="minimum duration of a segment, which no shorter one in the training labels contradicts; null: "
        "as fitted on the validation videos",
    )
    tool_smoothing_s: float = Field(
        0.0,
        ge=0,
        le=600,
        description="average the probabilities of tools over past frames, with weights that fall to 1/e within this "
        "time; 0: single frames",
    )

    @field_validator("tool_smoothing_s")
    @classmethod
    def _not_too_short(cls, seconds: float) -> float:
        if 0 < seconds < 1e-3:
            raise ValueError("must be 0, or at least 0.001")
        return seconds

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> DecodingConfig:
        if self.mode != "none" and self.given_unused:  # with none, an option may still choose another mode
            name, reason = next(iter(self.given_unused.items()))
            raise ValueError(f"{name}: has no effect with {reason}; leave it out, or set mode=causal")
        return self

    @property
    def unused(self) -> dict[str, str]:
        """The settings that have no effect, because of the values of others, each with that reason."""
        if self.mode in ("none", "calibrated", "filter"):
            return dict.fromkeys(("lag_s", "min_duration_s"), f"mode={self.mode}")
        return {} if self.mode == "causal" else {"lag_s": f"mode={self.mode}"}

    @property
    def given_unused(self) -> dict[str, str]:
        """Those of `unused` that differ from their default."""
        fields = type(self).model_fields
        return {name: reason for name, reason in self.unused.items() if getattr(self, name) != fields[name].default}


class TemporalConfig(LoopConfig):
    """Stage two: training a phase model on sequences of embeddings."""

    OMITTED = LoopConfig.OMITTED | {"decoding", "smoothing_weight", "feature_dropout"}

    head: HeadConfig = LstmHead()
    sequence: SequenceConfig = SequenceConfig()
    class_weighting: Literal["none", "inverse_frequency"] = "none"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    smoothing_weight: float = Field(
        0.0, ge=0, le=100, description="weight of MS-TCN's smoothing term (T-MSE; the paper's is 0.15)"
    )
    feature_dropout: float = Field(
        0.0, ge=0, lt=1, description="fraction of the features that are set to their mean in a whole training sequence"
    )
    standardise: bool = Field(
        True, description="standardise features by the mean and standard deviation of the training videos"
    )
    tool_logits: bool = Field(False, description="append the tool logits of stage one to each embedding")
    projection: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision of the LSTM's input projection, when training on a CPU; bf16 is faster on CPUs that "
        "support it; auto: fp32",
    )
    start_from: Path | None = Field(
        None, description="initialise the head from the joint net in this checkpoint (set by `--from-joint RUN`)"
    )
    baseline: bool = Field(True, description="also train a linear head on single frames in the same way, as a baseline")
    features: FeaturesIn = Field(
        "auto",
        description="keep all features in memory, or read each batch from the feature files (stream), with identical "
        "results; auto: stream if the features would take more than 40 % of the available memory",
    )
    decoding: DecodingConfig = DecodingConfig()


class JointNetConfig(Strict):
    """The branches of the joint net. `cnn.backbone` sets its backbone, and `temporal.head` its phase branch."""

    tasks: Literal["both", "tool", "phase"] = "both"
    tool_hidden: int | None = Field(
        None, ge=1, description="width of a hidden layer in the tool branch (MTRCNet-CL: 512); null: no hidden layer"
    )
    mapping: bool = Field(False, description="also predict tools from the phase branch, with a mapping (MTRCNet-CL)")

    @model_validator(mode="after")
    def _mapping_needs_both(self) -> JointNetConfig:
        if self.mapping and self.tasks != "both":
            raise ValueError(f"mapping=true needs tasks=both, not {self.tasks}")
        return self


class JointLossConfig(Strict):
    """The joint net's loss (docs/method.md).

    It is cross-entropy on phases + tool_weight * binary cross-entropy on tools + alpha * correlation.
    """

    tool_weight: float = Field(1.0, ge=0)
    phase_frames: Literal["all", "last"] = Field("all", description="frames of a clip that the phase loss covers")
    alpha: float = Field(1.0, ge=0, description="weight of the correlation term in step `correlation`")
    direction: Literal["mapped_branch", "branch_mapped"] = Field(
        "mapped_branch",
        description="mapped_branch: KL(mapped || branch), with the mapped prediction as the target; branch_mapped: the "
        "reverse",
    )
    detach: Literal["none", "mapped", "branch"] = Field(
        "mapped", description="which prediction receives no gradient from the correlation term"
    )


class JointOptimConfig(OptimConfig):
    """The optimiser of one training step of the joint net (`multitask`, `mapping` or `correlation`)."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"


class JointSequenceConfig(SequenceConfig):
    """How videos are divided into clips or chunks for the joint net."""

    mode: Literal["full", "chunked", "clips"] = "clips"
    frames: int = Field(10, ge=1, description="length of a chunk or clip")
    batch: int = Field(10, ge=1, description="videos (chunked) or clips per step")
    inference: Inference = Field(
        "clip", description="in evaluation: reset the state at each clip, or carry it through the whole video"
    )


class JointStepConfig(LoopConfig):
    """One training step of the joint net: `multitask`, `mapping` or `correlation`."""

    optim: JointOptimConfig = JointOptimConfig()
    backbone_lr_factor: float = Field(0.1, ge=0, le=1)
    freeze_mapping: bool = Field(False, description="in step `correlation`: keep the mapping as it is")


class JointConfig(Strict):
    """The joint mode: both stages as one net, trained end to end (MTRCNet and MTRCNet-CL)."""

    net: JointNetConfig = JointNetConfig()
    sequence: JointSequenceConfig = JointSequenceConfig()
    loss: JointLossConfig = JointLossConfig()
    multitask: JointStepConfig = JointStepConfig()
    mapping: JointStepConfig | None = Field(None, description="second step, which trains the mapping only")
    correlation: JointStepConfig | None = Field(
        None, description="third step, which trains all branches with the correlation term"
    )
    accumulate_steps: int = Field(1, ge=1)
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = Field(
        False, description="with several processes on CUDA: compute batch norm over the batches of all processes"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute the backbone's activations in the backward pass, to save memory"
    )
    clips_per_epoch: int | None = Field(
        None, ge=1, description="train on a random subset of this many clips in each epoch; null: on all clips"
    )
    workers: int = Field(
        -1, ge=-1, description="loader processes; -1: none on a CPU, otherwise one less than the cores, at most 16"
    )
    augment: AugmentConfig = AugmentConfig()
    crops: Literal["centre", "random", "five", "ten"] = Field(
        "centre", description="crops of each frame in evaluation; predictions of several crops are averaged"
    )

    @model_validator(mode="after")
    def _fits(self) -> JointConfig:
        if self.sequence.mode == "full":
            raise ValueError("sequence.mode=full would load the images of whole videos; use clips or chunked")
        if (self.mapping or self.correlation) and not self.net.mapping:
            raise ValueError("steps mapping and correlation need net.mapping=true")
        if self.correlation and not self.mapping:
            raise ValueError("step correlation needs step mapping before it; give joint.mapping too")
        return self


class CudaConfig(Strict):
    """torch's switches for NVIDIA GPUs. They apply to training, extraction and evaluation alike."""

    deterministic: bool = Field(True, description="use only deterministic kernels of cuDNN")
    benchmark: bool = Field(False, description="time cuDNN's kernels and use the fastest, which can change last bits")
    tf32: bool = Field(
        False, description="compute fp32 with 10 instead of 23 bits of the fraction (TF32); in the features' digest"
    )


class Config(Strict):
    """All settings of a run."""

    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    cuda: CudaConfig = CudaConfig()
    runs: Path = Path("runs")
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    cache: CacheConfig = CacheConfig()
    cnn: CnnConfig = CnnConfig()
    extract: ExtractConfig = ExtractConfig()
    temporal: TemporalConfig = TemporalConfig()
    joint: JointConfig = JointConfig()

    @model_serializer(mode="wrap")
    def _with_preprocess_in_full(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With an encoder that has its own preprocessing, defaults are written too: it would replace them if absent."""
        tree: dict[str, Any] = dump(self)
        if "preprocess" in tree and own_preprocess(self.cnn.backbone):
            omitted = {name: getattr(self.preprocess, name) for name in sorted(PreprocessConfig.OMITTED)}
            tree["preprocess"] = omitted | tree["preprocess"]
        return tree

    @model_validator(mode="before")
    @classmethod
    def _preprocess_follows_the_encoder(cls, tree: Any) -> Any:
        """Take the values of `preprocess` that are not given from the encoder, if it states its own."""
        if not isinstance(tree, Mapping):
            return tree
        cnn, given = tree.get("cnn"), {} if tree.get("preprocess") is None else tree["preprocess"]
        backbone = cnn.get("backbone") if isinstance(cnn, Mapping) else getattr(cnn, "backbone", None)
        if not isinstance(backbone, str) or not isinstance(given, Mapping):
            return tree
        own = own_preprocess(backbone)
        if "short_side_px" in own and "resize_px" in given:  # the size is given, the aspect is the encoder's
            resized = given["resize_px"]
            own["short_side_px"] = max(resized) if isinstance(resized, list | tuple) else resized
        return {**tree, "preprocess": {**own, **given}} if own else tree
