// The first kernel of launch.h where the blocks of a head are a cluster: each projects its rows to queries, keys and
// values, writes keys and values into the shared memory of all of them, and attends. Nothing passes through memory,
// whose latency, there and back, would be a good part of the time; and a barrier of the cluster, about 0.3 us, is cheap
// only as long as no stores to memory are on their way.
#pragma once

#include "heads.cuh"

namespace styleforge::cuda {

// The block's memory: a byte a key; then the ring of the product, or queries, all keys, all values, the product's sums.
template <typename Math, int kHeadDim, int kRows>
struct ClusterMemory {
  using Tile = HeadTile<Math, kHeadDim, kRows>;
  using Product = ProductTile<Math, kRows, 3 * kHeadDim>;
  static constexpr int kPartBytes = Product::kParts * kRows * Product::kSumPitch * static_cast<int>(sizeof(float));
  static __host__ __device__ int keys(int length) { return (length + Tile::kKeys - 1) / Tile::kKeys * Tile::kKeys; }
  static __host__ __device__ int parts(int length) { return Tile::kQueryBytes + 2 * keys(length) * Tile::kPitch; }
  static int bytes(int length) {
    return padded_length(length) + std::max({Product::kRingBytes, parts(length) + kPartBytes, Tile::kSumBytes});
  }
};

#ifdef STYLEFORGE_HAS_CLUSTER
template <typename V>
__device__ __forceinline__ void store_remote(uint32_t local, uint32_t rank, const V& v) {
  const uint32_t to = map_shared(local, rank);
  if constexpr (sizeof(V) == 16) {
    const auto& x = reinterpret_cast<const uint4&>(v);
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
  } else {
    const auto& x = reinterpret_cast<const uint2&>(v);
    asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(x.x), "r"(x.y) : "memory");
  }
}
#endif

template <typename Math, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kSmallThreads, 1)
    small_cluster_kernel(const __grid_constant__ SmallAttentionParams p, int padded) {
#if defined(STYLEFORGE_HAS_CLUSTER) && defined(STYLEFORGE_HAS_MMA)
  using Block = HeadBlock<Math, kHeadDim, kRows>;
  using Tile = typename Block::Tile;
  using Memory = ClusterMemory<Math, kHeadDim, kRows>;
  using T = typename Math::T;
  extern __shared__ __align__(128) unsigned char dynamic[];
  unsigned char* memory = dynamic + padded;
  const Block block{p};
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  wait_for_predecessor();
  release_successor();

  const int padded_keys = Memory::keys(p.length);
  unsigned char* keys = memory + Tile::kQueryBytes;
  unsigned char* values = keys + padded_keys * Tile::kPitch;
  __shared__ __align__(16) T bias[3 * kHeadDim];
  typename Block::Product product;
  if (block.rows > 0) {
    block.load_bias(bias);
    block.multiply(product, shared_address(memory));
  }
  write_parts(product, memory + Memory::parts(p.length), [] {
    __syncwarp();
    cluster_arrive();  // this block's ring is free for keys and values
  });
  block.fill_hidden(dynamic, padded);
  // Keys that no block has, up to a whole chunk.
  const int nobodys = static_cast<int>(blocks) * kRows;
  for (int i = threadIdx.x; i < (padded_keys - nobodys) * Tile::kUnits; i += kSmallThreads) {
    const int at = (nobodys + i / Tile::kUnits) * Tile::kPitch + i % Tile::kUnits * 16;
    *reinterpret_cast<uint4*>(keys + at) = *reinterpret_cast<uint4*>(values + at) = uint4{};
  }
  __syncthreads();  // the sums are there
  cluster_wait();
  add_parts<typename Block::Product>(memory + Memory::parts(p.length), [&](int row, int column, float (&sums)[4]) {
    const int part = column / kHeadDim, d = column % kHeadDim;
    Vec<T, 4> v{};  // of rows and columns that are not there
    if (row < block.rows && d < p.head_dim) {
      v = Block::with_bias(sums, bias + column);
      if (p.qkv != nullptr) block.store(v, row, part, d);
    }
    if (part == 0) {
      *reinterpret_cast<Vec<T, 4>*>(memory + row * Tile::kPitch + d * Block::kSize) = v;
      return;
    }
    if (block.first_row + row >= padded_keys) return;
    const uint32_t to = shared_address(part == 1 ? keys : values) + (block.first_row + row) * Tile::kPitch +
                        d * static_cast<int>(Block::kSize);
#pragma unroll 4
    for (uint32_t i = 0; i < blocks; ++i) store_remote(to, (rank + i) & (blocks - 1), v);
  });
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  if (block.rows <= 0) return;

  RunningSoftmax<Tile> softmax;
  const int chunks = (block.end_of_keys() + Tile::kKeys - 1) / Tile::kKeys;
  const auto attend = [&]<int kChunks>(int chunk) {
    const int at = chunk * Tile::kKeys * Tile::kPitch;
    block.template attend<kChunks>(softmax, shared_address(memory), keys + at, values + at, dynamic, chunk);
  };
  constexpr bool kByTwo = !Math::kSplit || kHeadDim == 32;  // for want of registers
  int chunk = 0;
  if constexpr (kByTwo) {
#pragma unroll 1
    for (; chunk + 2 <= chunks; chunk += 2) attend.template operator()<2>(chunk);
  }
#pragma unroll 1
  for (; chunk < chunks; ++chunk) attend.template operator()<1>(chunk);
  __syncthreads();
  block.finish(softmax, memory);
#endif
}

}  // namespace styleforge::cuda
