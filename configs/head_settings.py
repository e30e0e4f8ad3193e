"""The settings of temporal heads (`temporal.head`), without torch. `HEAD_SETTINGS` lists them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from configs.errors import UserError
from configs.registry import Registry
from configs.strict import Strict


class HeadSettings(Strict):
    """Base class of the settings of all heads; `name` selects the head (`HEAD_SETTINGS`)."""

    name: str

    @property
    def causal(self) -> bool:
        """Whether outputs depend on past frames only, so that state can be carried from chunk to chunk."""
        return True

    @property
    def has_bf16_projection(self) -> bool:
        """Whether `temporal.projection=bf16` has an effect on this head."""
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings as plain values with the head's name: other processes cannot import plug-ins' classes."""
        return read_head, (self.model_dump(),)


HEAD_SETTINGS: Registry[type[HeadSettings]] = Registry("head", "surgstage.heads")
DEFAULT_HEAD = "lstm"  # used if the settings do not name a head


def read_head(value: Any) -> HeadSettings:
    """Read the settings of any head. Raises ValueError for an unknown head, an unknown key or a wrong value."""
    if isinstance(value, HeadSettings):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("expected keys and values")
    settings = {"name": DEFAULT_HEAD, **value}
    try:
        kind = HEAD_SETTINGS.find(str(settings["name"]))
    except UserError as error:
        raise ValueError(str(error)) from error
    return kind.model_validate(settings)


HeadConfig = Annotated[SerializeAsAny[HeadSettings], BeforeValidator(read_head)]


class LstmHead(HeadSettings):
    name: Literal["lstm"] = "lstm"
    hidden: int = Field(512, ge=1, le=16384)
    layers: int = Field(1, ge=1, le=64)
    dropout: float = Field(0.0, ge=0, lt=1)
    bidirectional: bool = Field(False, description="also read the video backwards, which needs frames of the future")
    relu: bool = Field(False, description="ReLU on the LSTM's output (MTRCNet-CL)")
    fc_hidden: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="width of an additional linear layer with ReLU before the last layer; null: none",
    )

    @property
    def causal(self) -> bool:
        """Whether the LSTM reads forwards only."""
        return not self.bidirectional

    @property
    def has_bf16_projection(self) -> bool:
        """See `HeadSettings`."""
        return self.causal


class GruHead(HeadSettings):
    name: Literal["gru"]
    hidden: int = Field(512, ge=1, le=16384)
    layers: int = Field(1, ge=1, le=64)
    dropout: float = Field(0.0, ge=0, lt=1)


class TcnHead(HeadSettings):
    """Causal multi-stage TCN (TeCNO, Czempiel et al., MICCAI 2020)."""

    name: Literal["tcn"]
    stages: int = Field(2, ge=1, le=64)
    layers: int = Field(8, ge=1, le=14)
    maps: int = Field(32, ge=1, le=8192)
    dropout: float = Field(0.5, ge=0, lt=1)


class SsmHead(HeadSettings):
    """Causal selective state-space blocks of the kind of Mamba-2 (Dao and Gu, ICML 2024)."""

    name: Literal["ssm"]
    width: int = Field(256, ge=1, le=8192)
    layers: int = Field(2, ge=1, le=64)
    expand: int = Field(2, ge=1, le=16, description="channels of a block divided by the width")
    head_width: int = Field(64, ge=1, le=8192, description="channels that share a decay rate and a step size")
    state: int = Field(64, ge=1, le=4096, description="values that a block remembers per channel")
    step_min: float = Field(
        0.001, ge=1e-6, le=10, description="least step size at the start of a training; the memory is 1 / step frames"
    )
    step_max: float = Field(0.1, ge=1e-6, le=10, description="largest step size at the start of a training")
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> SsmHead:
        if (channels := self.expand * self.width) % self.head_width:
            raise ValueError(f"expand * width is {channels}, which must be a multiple of head_width={self.head_width}")
        if self.step_min > self.step_max:
            raise ValueError(f"step_min ({self.step_min:g}) must not exceed step_max ({self.step_max:g})")
        return self


class TransSvnetHead(HeadSettings):
    """Trans-SVNet (Gao et al., MICCAI 2021): the spatial embedding attends to a causal TCN's last outputs."""

    name: Literal["trans_svnet"]
    stages: int = Field(2, ge=1, le=16, description="stages of the TCN")
    layers: int = Field(8, ge=1, le=14, description="layers of each stage of the TCN")
    maps: int = Field(32, ge=1, le=8192, description="feature maps of the TCN")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout of the TCN")
    window: int = Field(30, ge=1, le=1000, description="number of the TCN's last outputs that are attended to")
    width: int = Field(32, ge=1, le=8192, description="width of the attention layers; a multiple of heads")
    heads: int = Field(4, ge=1, le=512, description="number of attention heads")

    @model_validator(mode="after")
    def _divisible(self) -> TransSvnetHead:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class MstcnPlusPlusHead(HeadSettings):
    """MS-TCN++ (Li et al., TPAMI 2020), which is offline: each output depends on frames before and after it."""

    name: Literal["mstcn++"]
    layers: int = Field(11, ge=1, le=14, description="dual dilated layers of the first stage")
    refinements: int = Field(3, ge=0, le=16, description="number of refinement stages")
    refinement_layers: int = Field(10, ge=1, le=14, description="layers of each refinement stage")
    maps: int = Field(64, ge=1, le=8192)
    dropout: float = Field(0.5, ge=0, lt=1)

    @property
    def causal(self) -> bool:
        """False: the convolutions are centred."""
        return False


class LinearHead(HeadSettings):
    """One linear layer on single frames: the baseline without temporal context."""

    name: Literal["linear"]


class CausalAttentionSettings(Strict):
    """The settings of causal self-attention, which two heads share."""

    width: int = Field(256, ge=2, le=8192, description="width of its tokens, a multiple of 2 * heads")
    layers: int = Field(2, ge=1, le=64)
    heads: int = Field(8, ge=1, le=512, description="number of attention heads")
    window: int = Field(
        256, ge=1, le=16384, description="number of frames that a layer attends to, the current one too"
    )
    dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides_into_pairs(self) -> CausalAttentionSettings:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} is not a multiple of 2 * heads = {2 * self.heads}: rotary positions need an even "
                "width in each attention head; change one of the two"
            )
        return self


class AttentionHead(CausalAttentionSettings, HeadSettings):
    """Causal self-attention within a window (docs/heads.md)."""

    name: Literal["attention"]


class KeyPoolingHead(CausalAttentionSettings, HeadSettings):
    """A recent window, and the maximum of keys over the whole past (SKiT, Liu et al., ICCV 2023)."""

    name: Literal["key_pooling"]
    window: int = Field(
        100, ge=1, le=16384, description="number of frames that a layer attends to, the current one too"
    )
    keys: int = Field(64, ge=1, le=8192, description="width of the keys whose maximum is kept")


for _kind in HeadSettings.__subclasses__():  # the classes above; plug-ins register theirs together with the head
    HEAD_SETTINGS.register(get_args(_kind.model_fields["name"].annotation)[0], _kind)
