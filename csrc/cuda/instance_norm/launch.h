// Instance norm on CUDA: what the operator layer calls. See csrc/instance_norm_params.h for the formulas.
//
//   path     format         what stays on chip                                launches  where
//   plane    NCHW           a plane, in one block's or one cluster's shared      1      plane.cu,
//                           memory or registers: one read, one write                    held_plane.cu,
//                                                                                       bulk_plane.cu
//   stream   NCHW           tiles of planes on their way through shared memory: 1 - 2    stream.cu
//                           one read, one write, planes of any size (sm_90+)
//            channels_last  the same of slices of the channels; all blocks       1      stream_channels_last.cu,
//                           run at once, or slices that a cluster or a team of          cluster_channels.cu,
//                           blocks holds (sm_90+)                                       team_channels.cu
//   held     channels_last  the whole tensor, in all multiprocessors' registers  1      held_channels.cu
//   resident channels_last  the same in their shared memory (sm_90+)             1      resident.cu
//   slab     channels_last  a few neighbouring channels of one sample, all       1      slab.cu
//                           their pixels, in a block or cluster
//   split    both           nothing: statistics of tiles, then a second pass    2 - 3   split_nchw.cu,
//                           that mostly hits the L2 cache                               split_channels_last.cu,
//                                                                                      few_channels.cu
#pragma once

#include <cuda_runtime.h>

#include "../../instance_norm_params.h"

namespace styleforge::cuda {

enum class InstanceNormPath {
  kPlane,
  kHeldPlane,
  kBulkPlane,
  kStream,
  kChannelStream,
  kChannelCluster,
  kChannelTeam,
  kSlab,
  kFewChannels,
  kSplit,
  kResident,
  kHeldChannels
};

// How a call is going to run. `workspace_bytes` of device memory must be given to the launch (16-byte aligned).
struct InstanceNormSchedule {
  InstanceNormPath path = InstanceNormPath::kSplit;
  bool vectorized = false;  // accesses of several elements; else one by one
  int width = 1;            // split, backward in channels_last: elements of an access
  int cluster = 1;          // blocks that share a plane or slab
  int copies_log2 = 0;      // plane in registers: clusters that store one part of the same plane each
  int threads = 256;
  int lanes = 1;      // slab and split in channels_last: vectors of one pixel side by side in a block
  int64_t share = 0;  // plane, slab: vectors or pixels a block holds; split, stream: those of one tile
  int64_t parts = 1;  // split, stream: tiles of a plane or sample
  int64_t lead = 0;   // split, NCHW: > 0 takes the ticket kernel, by how many tiles pass 1 runs ahead
  // stream: tiles that a block holds, blocks, tiles that a block has by its number (0: all) and tickets that it draws
  // at once after those, and whether the L2 cache is to let go of the input and the output first
  int stages = 1;
  int blocks = 0;
  int first = 0;
  int fill = 1;
  int prefetched = 0;  // what the L2 cache gets before the predecessor is through: tiles of a block; plane: blocks
  bool read_once = false;
  bool stream_stores = false;
  // stream in channels_last: tiles of a unit that a block keeps (in registers, few channels: a thread's vectors), tiles
  // on their way at a time, whether every block merges the statistics of all channels, and whether the L2 cache is to
  // hold on to what will be read again
  int held = 1;
  int ahead = 1;
  int teams = 1;  // of the stream path's blocks, with units of their own each
  bool direct = false;
  bool keep = false;
  size_t shared_bytes = 0;
  size_t workspace_bytes = 0;
  const char* name = "";  // for last_path()
};

// A pure function of the shape and the device, but for STYLEFORGE_PATH, which tests set: plane takes a cluster of 16
// where that is not the choice, bulk the planes by bulk copies, stream the ring where the tensor allows it, resident
// and held hold what they can of channels_last, split takes the two passes, ticket the two passes by tickets (NCHW),
// portable does as on a device without clusters, as do calls without `clusters`.
cudaError_t schedule_instance_norm(const InstanceNormParams& params, InstanceNormSchedule& schedule,
                                   bool clusters = true);

cudaError_t launch_instance_norm(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream);

// Backward: one launch in channels_last where the multiprocessors hold input and gradient (backward_held.cu,
// backward_resident.cu), else two passes (reduce, apply) in either format, as with STYLEFORGE_PATH=split or portable
// and without `resident`: a part of a GPU may have no place for all blocks (cudaErrorCooperativeLaunchTooLarge,
// cudaErrorNotSupported).
cudaError_t schedule_instance_norm_backward(const InstanceNormBackwardParams& params, InstanceNormSchedule& schedule,
                                            bool resident = true);
cudaError_t launch_instance_norm_backward(const InstanceNormBackwardParams& params,
                                          const InstanceNormSchedule& schedule, void* workspace, cudaStream_t stream);

// From what the backward leaves in grad_weight and grad_bias.
struct ParameterGradients {
  const void* weight_sums = nullptr;  // [samples, count], float (double with sums_in_double)
  const void* bias_sums = nullptr;
  void* weight = nullptr;  // [count] of `dtype`; null where not wanted
  void* bias = nullptr;
  int64_t samples = 0, count = 0;
  DType dtype = DType::kFloat32;
  bool sums_in_double = false;
};
cudaError_t launch_parameter_gradients(const ParameterGradients& gradients, cudaStream_t stream);

}  // namespace styleforge::cuda
