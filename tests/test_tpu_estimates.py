# ruff: noqa: E501
"""Estimates are read correctly from what the TPU compiler writes."""

import pytest

from benchmarks import tpu_estimates

HLO = """HloModule jit_step, is_scheduled=true

FileNames
1 "/src/focusformer_jax/training/optim.py"
2 "/src/focusformer_jax/models/layers.py"
3 "/lib/jax/lax.py"

FunctionNames
1 "update"
2 "LayerNorm.__call__"
3 "_dense"
4 "dot"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=2 line=2}
3 {file_name_id=2 function_name_id=3 line=3}
4 {file_name_id=3 function_name_id=4 line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=4}


%fused (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %convolution.1 = f32[8]{0} convolution(%a, %a), metadata={stack_frame_id=4}
}

%body (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %norm = f32[8]{0} fusion(%b), calls=%other, metadata={stack_frame_id=2}, backend_config={"estimated_cycles":"10"}
  ROOT %product = f32[8]{0} fusion(%norm), calls=%fused, metadata={stack_frame_id=4}, backend_config={"estimated_cycles":"100"}
}

%cheap (c: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%c), backend_config={"estimated_cycles":"1"}
}

%dear (d: f32[8]) -> f32[8] {
  ROOT %copy.2 = f32[8]{0} copy(%d), metadata={stack_frame_id=1}, backend_config={"estimated_cycles":"5"}
}

ENTRY %main (e: f32[8], i: s32[20000,1]) -> f32[8] {
  %e = f32[8]{0} parameter(0)
  %i = s32[20000,1]{1,0} parameter(1)
  %loop = f32[8]{0} while(%e), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %branch = f32[8]{0} conditional(%p, %e, %e, %e), branch_computations={%cheap, %cheap, %dear}
  %kernel.1 = f32[8]{0} custom-call(%e), custom_call_target="tpu_custom_call", backend_config={"body":"TUw="}
  %kernel.2 = f32[8]{0} custom-call(%e), custom_call_target="tpu_custom_call", backend_config={"body":"TUw="}
  %ends.1 = f32[8]{0} custom-call(%e), custom_call_target="Sharding"
  %many = f32[20000]{0} gather(%e, %i), offset_dims={}, index_vector_dim=1, slice_sizes={1}
  ROOT %few = f32[10]{0} gather(%e, %few_indices), offset_dims={}, index_vector_dim=1, slice_sizes={1}
  %few_indices = s32[10,1]{1,0} constant(0)
}
"""

# A loop over 5 of a grid, inside it a loop of 4 with an empty bundle.
BUNDLES = """= control target key start
LB: loop body
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sphi %s1 }
   0x2   : > { %s3 = sadd.s32 1, %s2 }
   0x3 LB: >> { %s4 = sphi %s3 }
   0x4   :  {}
   0x5   : >> { %p = scmp.ge.s32.totalorder %s4, 4 /* loop exit test */ }
   0x6   : > { %q = scmp.ge.s32.totalorder %s3, 5 /* loop exit test */ }
   0x7   :  { %s9 = smov 1 }
"""


def test_cycles_of_a_module_by_part():
  module = tpu_estimates.Module(HLO)
  cycles = module.cycles({'kernel.1': 1000, 'kernel.2': 200})
  assert cycles == {
    ('norm', 'norms'): 30,
    ('product', 'products'): 300,
    ('copy.2', 'optimizer'): 5,
    ('kernel.1', 'other'): 1000,
    ('kernel.2', 'other'): 200,
  }
  assert module.cycles({'kernel.1': 0, 'kernel.2': 0}, 'mean').total() == 333
  parts = tpu_estimates.by_part(cycles, hertz=1e3)
  assert parts['norms'] == pytest.approx(30)
  assert tuple(parts) == tpu_estimates.PARTS


def test_kernel_without_bundles_is_refused():
  with pytest.raises(KeyError, match=r'kernel\.1'):
    tpu_estimates.Module(HLO).cycles({})


def test_equal_kernels_share_the_code_that_is_written_once():
  """The compiler dumps collectives too, whose code has no loop over a grid."""
  module = tpu_estimates.Module(HLO)
  code = {'kernel.1': BUNDLES, 'all-reduce.1': ''}
  assert module.kernels(code) == {'kernel.1': BUNDLES, 'kernel.2': BUNDLES}
  with pytest.raises(KeyError, match='TUw='):
    module.kernels({'all-reduce.1': ''})


def test_large_gathers_are_counted_by_their_indices():
  assert tpu_estimates.Module(HLO).large_gathers() == 1


def test_bundles_are_multiplied_by_the_trips_of_their_loops():
  assert tpu_estimates.kernel_cycles(BUNDLES) == 2 + 5 * (3 + 4 * 3)
  assert tpu_estimates.kernel_cycles(BUNDLES, 0.5) == 2 + 5 * (3 + 4 * 3 / 2)


def test_kernels_are_read_by_the_name_of_their_instruction(tmp_path):
  (tmp_path / '17-attention.1-01-final_bundles.txt').write_text(BUNDLES)
  analysis = tmp_path / '17-attention.1-00-schedule-analysis_final_bundles.txt'
  analysis.write_text('')
  found = tpu_estimates.read_kernels(tmp_path)
  assert found['attention.1'] == BUNDLES
