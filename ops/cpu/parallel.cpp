#include "parallel.h"

#include "../stable.h"

namespace styleforge {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                  void* context) {
  check_shim(torch_parallel_for(0, count, grain, body, context), "torch_parallel_for");
}

}  // namespace styleforge
