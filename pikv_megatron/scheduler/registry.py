"""Retention policies by the name they have in `PiKVConfig.retention`."""

from pikv_megatron.scheduler.keep_all import KeepAll

RETENTION_POLICIES = {"all": KeepAll}
