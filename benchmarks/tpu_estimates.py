"""Time of a compiled TPU program, from the text that its compiler leaves.

Two sources, neither of which needs a TPU:

* The optimized HLO carries the compiler's estimate of cycles for each fusion,
  product and copy. Loops multiply their bodies.
* Pallas kernels have no such estimate. The compiler can write the final code of
  each; every bundle takes one cycle or more.

Gathers, scatters, collectives and transfers have neither, so a sum is a lower
bound.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import math
import pathlib
import re

# The parts of a step. `other` is elementwise work, copies and losses.
PARTS = (
  'augmentation',
  'attention',
  'norms',
  'products',
  'optimizer',
  'draws',
  'other',
)

# Part of an operation by the innermost of these files in its call stack. Other
# files of the network and of the steps end the search: the optimizer calls the
# loss.
PART_OF_FILE = {
  'data/augment.py': 'augmentation',
  'data/randaugment.py': 'augmentation',
  'data/randaugment_tpu.py': 'augmentation',
  'models/attention.py': 'attention',
  'training/optim.py': 'optimizer',
  'training/curricula.py': 'draws',
  'sampler/conditional.py': 'draws',
  'sampler/cost_bins.py': 'draws',
  'sampler/policy.py': 'draws',
}
# By function, in the files of which only a part belongs to a part of the step.
PART_OF_FUNCTION = {('models/layers.py', 'LayerNorm.__call__'): 'norms'}
ENDS = ('models/', 'training/')
PACKAGE = 'focusformer_jax/'

# Indices from which on a gather or a scatter is worth mentioning.
MANY_INDICES = 10_000

# The options of the compiler that make it write the final code of kernels.
DUMP_OPTIONS = (
  '--xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=final_bundles '
  '--xla_jf_dump_to={folder}'
)

_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$'
)
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{$')
_BUNDLE = re.compile(r'^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)')
_EXIT_TEST = re.compile(r'totalorder %\w+, (\d+) /\* loop exit test')
_FREE = frozenset(
  [
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'partition-id',
    'replica-id',
  ]
)


def kernel_cycles(final_bundles: str, inner_share: float = 1.0) -> float:
  """Bundles that a kernel executes, from the text of its final code.

  Every region counts as entered, whatever its predicate.

  Args:
    final_bundles: What the compiler writes with `DUMP_OPTIONS`.
    inner_share: Factor for the loops inside the loop over the grid.
  """
  trips, own = [1], [0.0]

  def close():
    count, bundles = trips.pop(), own.pop()
    own[-1] += count * bundles * (inner_share if len(own) == 2 else 1)

  for line in final_bundles.splitlines():
    match = _BUNDLE.match(line)
    if not match:
      continue
    # Empty bundles are written without the depth of their loop.
    depth = len(match[2]) if '{}' not in line else len(own) - 1
    while len(own) - 1 > depth - (match[1] == 'LB'):
      close()
    if match[1] == 'LB':
      trips.append(1)
      own.append(0.0)
    own[-1] += 1
    if exit_test := _EXIT_TEST.search(line):
      trips[-1] = int(exit_test[1])
  while len(own) > 1:
    close()
  return own[0]


def read_kernels(folder: pathlib.Path) -> dict[str, str]:
  """The final code of everything that was compiled, by instruction."""
  found = {}
  for path in sorted(folder.glob('*-final_bundles.txt')):
    name = re.fullmatch(r'\d+-(.+)-\d+-final_bundles', path.stem)[1]
    found[name] = path.read_text()
  return found


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  operation: str
  rest: str

  def attribute(self, pattern: str) -> str | None:
    match = re.search(pattern, self.rest)
    return match and match[1]

  @property
  def is_kernel(self) -> bool:
    """Whether it runs a Pallas kernel."""
    return '"tpu_custom_call"' in self.rest

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.rest.partition('), ')[0])


def _dimensions(hlo_type: str) -> list[int]:
  sides = re.search(r'\[([\d,]*)\]', hlo_type)[1]
  return [int(side) for side in sides.split(',') if side]


class Module:
  """A compiled module, parsed from its text."""

  def __init__(self, hlo: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.tables = collections.defaultdict(dict)
    computation = table = ''
    for line in hlo.splitlines():
      if match := _COMPUTATION.match(line):
        computation = match[2]
        self.computations[computation] = []
        if match[1]:
          self.entry = computation
      elif match := _INSTRUCTION.match(line):
        self.computations[computation].append(_Instruction(*match.groups()))
      elif re.fullmatch(r'[A-Z][A-Za-z]+', line):
        table = line
      elif match := re.match(r'(\d+) (.+)', line):
        self.tables[table][int(match[1])] = match[2]

  def stack(self, instruction: _Instruction) -> Iterator[tuple[str, str]]:
    """File in the package and function of each frame, innermost first."""

    def numbers(text):
      return {
        name: int(number) for name, number in re.findall(r'(\w+)=(\d+)', text)
      }

    frame = int(instruction.attribute(r'stack_frame_id=(\d+)') or 0)
    while frame:
      found = numbers(self.tables['StackFrames'][frame])
      place = numbers(self.tables['FileLocations'][found['file_location_id']])
      file = self.tables['FileNames'][place['file_name_id']].strip('"')
      function = self.tables['FunctionNames'][place['function_name_id']]
      if PACKAGE in file:
        yield file.rpartition(PACKAGE)[2], function.strip('"')
      # A parent's number is one more than its frame's.
      frame = found.get('parent_frame_id', 1) - 1

  def contains(self, computation: str, operation: str) -> bool:
    return any(
      instruction.operation == operation
      or operation in instruction.name
      or (
        (called := instruction.attribute(r'calls=%?([\w.-]+)'))
        and self.contains(called, operation)
      )
      for instruction in self.computations.get(computation, ())
    )

  def part(self, instruction: _Instruction) -> str:
    """The member of `PARTS` that an instruction belongs to."""
    for file, function in self.stack(instruction):
      part = PART_OF_FUNCTION.get((file, function)) or PART_OF_FILE.get(file)
      if part:
        return part
      if file.startswith(ENDS):
        break
    called = instruction.attribute(r'calls=%?([\w.-]+)')
    is_product = instruction.operation in ('convolution', 'dot') or (
      called
      and any(self.contains(called, name) for name in ('convolution', 'dot'))
    )
    return 'products' if is_product else 'other'

  def kernels(self, code: Mapping[str, str]) -> dict[str, str]:
    """The final code of each Pallas kernel, by the name of its instruction.

    Args:
      code: As from `read_kernels`. The compiler writes kernels that are equal,
        such as those of several layers, once.

    Raises:
      KeyError: No equal kernel is in `code`.
    """
    kernels = {
      instruction.name: instruction.attribute(r'"body":"([^"]*)"')
      for instructions in self.computations.values()
      for instruction in instructions
      if instruction.is_kernel
    }
    code_of = {kernels[name]: code[name] for name in kernels.keys() & code}
    return {name: code_of[kernel] for name, kernel in kernels.items()}

  def _trips(self, loop: _Instruction) -> int:
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)

    def constants(computation):
      for instruction in self.computations.get(computation, ()):
        if instruction.operation == 'constant':
          if match := re.match(r'(\d+)\)', instruction.rest):
            yield int(match[1])
        if called := instruction.attribute(r'calls=%?([\w.-]+)'):
          yield from constants(called)

    condition = loop.attribute(r'condition=%?([\w.-]+)')
    return max(constants(condition), default=1)

  def cycles(
    self, kernels: Mapping[str, float], branch: str = 'largest'
  ) -> collections.Counter:
    """Estimated cycles of one run, by instruction and part.

    Args:
      kernels: Cycles of each custom call, by the name of its instruction.
      branch: Of a conditional, count the `largest` branch or the `mean` of all
        but the first, which the supernet uses for absent layers.

    Raises:
      KeyError: A Pallas kernel is missing from `kernels`.
    """
    total = collections.Counter()

    def visit(computation, times, total):
      for instruction in self.computations.get(computation, ()):
        operation = instruction.operation
        if operation in _FREE:
          continue
        if operation == 'while':
          body = instruction.attribute(r'body=%?([\w.-]+)')
          visit(body, times * self._trips(instruction), total)
        elif operation == 'call':
          visit(instruction.attribute(r'to_apply=%?([\w.-]+)'), times, total)
        elif operation == 'conditional':
          self._add_branch(instruction, times, total, branch, visit)
        else:
          found = instruction.attribute(r'"estimated_cycles":"(\d+)"')
          cycles = float(found or 0)
          if instruction.is_kernel:
            cycles = kernels[instruction.name]
          if cycles:
            total[instruction.name, self.part(instruction)] += cycles * times

    visit(self.entry, 1, total)
    return total

  def _add_branch(self, instruction, times, total, branch, visit):
    named = instruction.attribute(r'branch_computations=\{([^}]*)\}')
    if named:
      names = [name.strip().lstrip('%') for name in named.split(',')]
    else:
      names = re.findall(
        r'(?:true|false)_computation=%?([\w.-]+)', instruction.rest
      )
    branches = []
    for name in names:
      branches.append(collections.Counter())
      visit(name, times, branches[-1])
    if branch == 'largest' or len(branches) < 3:
      total.update(max(branches, key=lambda b: b.total()))
      return
    for found in branches[1:]:
      for key, cycles in found.items():
        total[key] += cycles / (len(branches) - 1)

  def large_gathers(self) -> int:
    """Gathers and scatters of more than `MANY_INDICES` indices."""
    count = 0
    for instructions in self.computations.values():
      types = {i.name: i.type for i in instructions}
      for instruction in instructions:
        if instruction.operation not in ('gather', 'scatter'):
          continue
        operands = instruction.operands
        # A scatter may have several operands, its indices stand in the middle.
        indices = _dimensions(types[operands[(len(operands) - 1) // 2]])
        if instruction.operation == 'gather':
          indices = _dimensions(types[operands[1]])
        axis = int(instruction.attribute(r'index_vector_dim=(\d+)'))
        indices = indices[:axis] + indices[axis + 1 :]
        count += math.prod(indices) > MANY_INDICES
    return count


def by_part(cycles: collections.Counter, hertz: float) -> dict[str, float]:
  """Milliseconds of each of `PARTS`, from `Module.cycles`."""
  parts = dict.fromkeys(PARTS, 0.0)
  for (_, part), count in cycles.items():
    parts[part] += 1e3 * count / hertz
  return parts
