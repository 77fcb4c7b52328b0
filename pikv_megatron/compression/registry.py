"""Codecs by the name they have in `PiKVConfig.codec`."""

from pikv_megatron.compression.none import NoCodec

CODECS = {"none": NoCodec}
