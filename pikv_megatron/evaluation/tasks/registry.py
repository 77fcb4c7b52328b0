"""The tasks by name."""

from pikv_megatron.evaluation.tasks.base import TaskKind
from pikv_megatron.evaluation.tasks.common_words import CommonWords
from pikv_megatron.evaluation.tasks.copying import Copying
from pikv_megatron.evaluation.tasks.frequent_words import FrequentWords
from pikv_megatron.evaluation.tasks.greedy import Greedy
from pikv_megatron.evaluation.tasks.instructions import Instructions
from pikv_megatron.evaluation.tasks.json_lines import JsonLines
from pikv_megatron.evaluation.tasks.needle import SingleNeedle
from pikv_megatron.evaluation.tasks.needle_keys import NeedleAmongKeys
from pikv_megatron.evaluation.tasks.needle_queries import NeedleQueries
from pikv_megatron.evaluation.tasks.needle_values import NeedleValues
from pikv_megatron.evaluation.tasks.nth_item import NthItem
from pikv_megatron.evaluation.tasks.recall import Recall
from pikv_megatron.evaluation.tasks.shared_context import SharedContext
from pikv_megatron.evaluation.tasks.state import StateTracking
from pikv_megatron.evaluation.tasks.text import Text
from pikv_megatron.evaluation.tasks.variables import Variables

KINDS: tuple[type[TaskKind], ...] = (
    SingleNeedle, NeedleAmongKeys, NeedleValues, NeedleQueries, Variables, CommonWords,
    FrequentWords, Recall, Copying, NthItem, SharedContext, Instructions, StateTracking, Text,
    Greedy, JsonLines,
)
TASKS: dict[str, TaskKind] = {kind.name: kind() for kind in KINDS}
