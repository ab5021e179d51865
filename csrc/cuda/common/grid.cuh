// How the blocks of a cooperative launch hear of each other without standing still, and (GridGate) those of a launch
// that is not.
//
// Waiting for the whole grid costs twice: before it, what was written has to have arrived (a fence), and after it, what
// the others wrote has to be read. A pair of floats that is written in one piece can instead say by itself that it is
// there: readers ask for it until it is no longer the mark that stood in its place. The marks come first, and nobody
// may write before all of them are there: that needs the grid's barrier, but early, while there is other work.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace styleforge::cuda {

// What a block's arrival adds to the counter: the first one's turns the highest bit over once the others are there, or
// theirs do; the rest returns to what it was.
__device__ __forceinline__ uint32_t grid_share() {
  const uint32_t others = gridDim.x * gridDim.y * gridDim.z - 1;
  return blockIdx.x + blockIdx.y + blockIdx.z == 0 ? 0x80000000u - others : 1u;
}

// One thread of each block arrives, and one (the same, or one that got the token) waits: what all blocks did before
// they arrived is seen after the wait. Not beside other barriers of the grid. A launch's blocks must be resident
// together; the counter is the driver's, as for cooperative_groups::grid_group::sync, whose threads all stand still.
__device__ __forceinline__ uint32_t grid_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t own = grid_share();
  uint32_t token;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(token)
               : "l"(&cooperative_groups::details::get_grid_workspace()->barrier), "r"(own)
               : "memory");
  return token;
#else
  return 0;
#endif
}
__device__ __forceinline__ void grid_wait(uint32_t token) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t* barrier = &cooperative_groups::details::get_grid_workspace()->barrier;
  while (true) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
    if (((now ^ token) & 0x80000000u) != 0) break;
    __nanosleep(40);
  }
#endif
}

// The same in two steps, of which the second waits for no answer: what `grid_phase` gave before takes the place of the
// token. The phase cannot end before this block arrives.
__device__ __forceinline__ uint32_t grid_phase() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t now;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(now)
               : "l"(&cooperative_groups::details::get_grid_workspace()->barrier)
               : "memory");
  return now;
#else
  return 0;
#endif
}
__device__ __forceinline__ void grid_arrive_unanswered() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t own = grid_share();
  asm volatile(
      "red.release.gpu.global.add.u32 [%0], %1;" ::"l"(&cooperative_groups::details::get_grid_workspace()->barrier),
      "r"(own)
      : "memory");
#endif
}

// A grid without the launch's promise that all blocks are resident together. Its blocks count themselves: once all have
// started, each may wait for what the others will do. Where some do not get a place for too long, one of them calls it
// off, and nobody waits: whoever leaves last does what is left.
//
// A gate belongs to one node of a graph, whose runs follow each other; none leaves anything in it but another turn.
struct GridGate {
  static constexpr uint32_t kCount = 0x7fff, kAborted = 0x8000, kTurn = 0x10000;
  uint32_t state;  // blocks that have started; whether it is called off; turns
  uint32_t left;   // blocks that have left a grid that was called off
};

// By one thread of each block; the result is for gate_opens. What it did before is seen behind an open gate.
__device__ __forceinline__ uint32_t gate_arrive(GridGate* gate, uint32_t blocks, uint32_t patience) {
  uint32_t before = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (patience == 0) atomicOr(&gate->state, GridGate::kAborted);
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(&gate->state) : "memory");
  if ((before & (GridGate::kCount | GridGate::kAborted)) == blocks - 1) {
    asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(&gate->state), "r"(GridGate::kTurn - blocks)
                 : "memory");
  }
#endif
  return before;
}
// Waits, at most `patience` nanoseconds, until all blocks have started; false: it is called off.
__device__ __forceinline__ bool gate_opens(GridGate* gate, uint32_t before, uint32_t blocks, uint32_t patience) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto nanoseconds = [] {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
  };
  const uint64_t since = nanoseconds();
  while (true) {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(&gate->state) : "memory");
    if ((now & GridGate::kAborted) != 0) return false;
    if ((now ^ before) >= GridGate::kTurn || (now & GridGate::kCount) == blocks) return true;
    if (nanoseconds() - since >= patience) {
      if (atomicCAS(&gate->state, now, now | GridGate::kAborted) == now) return false;
    } else {
      __nanosleep(40);
    }
  }
#else
  return true;
#endif
}
// Of a grid that is called off, by one thread of each block: true for the last one, which sees what the others did.
__device__ __forceinline__ bool gate_leave(GridGate* gate, uint32_t blocks) {
  __threadfence();
  const bool last = atomicAdd(&gate->left, 1) == blocks - 1;
  __threadfence();
  return last;
}
// By that one: all have started and are through.
__device__ __forceinline__ void gate_reset(GridGate* gate) {
  gate->left = 0;
  gate->state = (gate->state & ~(GridGate::kTurn - 1)) + GridGate::kTurn;
}

// The mark is a second number with all bits set, which no arithmetic gives: its NaN is another.
constexpr uint32_t kAbsent = 0xffffffffu;

__device__ __forceinline__ bool is_there(const float2& pair) { return __float_as_uint(pair.y) != kAbsent; }
__device__ __forceinline__ void retract(float2* pair) {
  *pair = make_float2(__uint_as_float(kAbsent), __uint_as_float(kAbsent));
}
__device__ __forceinline__ void publish(float2* to, float2 pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (!is_there(pair)) pair.y = __uint_as_float(0x7fffffffu);
  const uint64_t bits = uint64_t{__float_as_uint(pair.y)} << 32 | __float_as_uint(pair.x);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
#endif
}
// What stands there now.
__device__ __forceinline__ float2 look(const float2* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  return make_float2(__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32)));
#else
  return *from;
#endif
}
__device__ __forceinline__ float2 await(const float2* from) {
  float2 pair;
  do {
    pair = look(from);
  } while (!is_there(pair));
  return pair;
}

// A pair that is asked for until it is there, and no longer: what readers ask again for is on the writers' way.
struct Awaited {
  uint64_t bits = ~uint64_t{0};
  __device__ __forceinline__ bool there() const { return static_cast<uint32_t>(bits >> 32) != kAbsent; }
  __device__ __forceinline__ float first() const { return __uint_as_float(static_cast<uint32_t>(bits)); }
  __device__ __forceinline__ float second() const { return __uint_as_float(static_cast<uint32_t>(bits >> 32)); }
  __device__ __forceinline__ void look(const float2* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %2, 0;\n"
        "@p ld.relaxed.gpu.global.b64 %0, [%1];\n"
        "}\n"
        : "+l"(bits)
        : "l"(from), "r"(static_cast<int>(!there()))
        : "memory");
#endif
  }
};
// Two neighbouring ones, aligned to 16 bytes. Each comes in one piece; the two may not come together.
struct AwaitedTwo {
  Awaited pair[2];
  __device__ __forceinline__ bool there() const { return pair[0].there() && pair[1].there(); }
  __device__ __forceinline__ void look(const float2* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %3, 0;\n"
        "@p ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];\n"
        "}\n"
        : "+l"(pair[0].bits), "+l"(pair[1].bits)
        : "l"(from), "r"(static_cast<int>(!there()))
        : "memory");
#endif
  }
};

}  // namespace styleforge::cuda
