// The launches behind instance_norm/launch.h, one for each path.
#pragma once

#include "launch.h"

namespace styleforge::cuda {

cudaError_t launch_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule, cudaStream_t stream);
cudaError_t launch_slab(const InstanceNormParams& params, const InstanceNormSchedule& schedule, cudaStream_t stream);
// The largest tile of the stream path in bytes, the most stages that its blocks have, and what lies before the parts in
// its workspace (the ticket counter).
constexpr int kStreamTile = 32 * 1024;
constexpr int kStreamStages = 16;
constexpr size_t kStreamHead = 16;
cudaError_t launch_stream(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                          cudaStream_t stream);
// The same in channels_last: threads that take statistics (and as many that apply them), rows of a tile that such a
// thread has at most, channels of a slice at most.
constexpr int kChannelStreamThreads = 256;
constexpr int kChannelStreamRows = 4;
constexpr int kChannelStreamChannels = 128;
cudaError_t launch_channel_stream(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                  void* workspace, cudaStream_t stream);
// Planes whose part of a block is in registers: threads of a block, and vectors of a thread, at most.
constexpr int kHeldThreads = 512;
constexpr int kHeldVectors = 8;
cudaError_t launch_held_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                              cudaStream_t stream);
// Large planes whose part of a block comes by one bulk copy: threads of a block at most.
constexpr int kBulkPlaneThreads = 256;
cudaError_t launch_bulk_plane(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                              cudaStream_t stream);
// The same by clusters, each with units of its own.
constexpr int kClusterChannels = 64;
cudaError_t launch_channel_cluster(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                   cudaStream_t stream);
// The same by teams of blocks.
cudaError_t launch_channel_team(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                                cudaStream_t stream);
// channels_last with very few channels: threads of a block (a multiple of the channels), vectors of a thread at most.
constexpr int kFewThreads = 384;
constexpr int kFewVectors = 4;
cudaError_t launch_few_channels(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                                cudaStream_t stream);
cudaError_t launch_split_nchw(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                              cudaStream_t stream);
cudaError_t launch_split_channels_last(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                       void* workspace, cudaStream_t stream);
cudaError_t launch_backward_nchw(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream);
// channels_last held in shared memory, forward and backward: threads of a block and vectors of a slice, at most.
constexpr int kResidentThreads = 512;
constexpr int kResidentLanes = 4;
cudaError_t launch_resident(const InstanceNormParams& params, const InstanceNormSchedule& schedule, void* workspace,
                            cudaStream_t stream);
cudaError_t launch_backward_resident(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                     void* workspace, cudaStream_t stream);
// channels_last held in registers, forward and backward: threads of a block that have data, and vectors of each, at
// most; and where the backward has its input in registers, too, not in shared memory.
constexpr int kHeldChannelThreads = 512;
constexpr int kHeldChannelVectors = 16;
constexpr int kHeldBackwardVectors = 4;
cudaError_t launch_held_channels(const InstanceNormParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream);
cudaError_t launch_backward_held(const InstanceNormBackwardParams& params, const InstanceNormSchedule& schedule,
                                 void* workspace, cudaStream_t stream);
cudaError_t launch_backward_channels_last(const InstanceNormBackwardParams& params,
                                          const InstanceNormSchedule& schedule, void* workspace, cudaStream_t stream);

}  // namespace styleforge::cuda
