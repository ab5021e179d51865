// The path of the most recent operator call. One for the process, so only libstyleforge.so has it.
#include "checks.h"

#include <atomic>

namespace styleforge {
namespace {
std::atomic<const char*> last_path{""};
}

void record_path(const char* path) { last_path.store(path, std::memory_order_relaxed); }

}  // namespace styleforge

// Read by Python through ctypes.
extern "C" STYLEFORGE_API const char* styleforge_last_path() {
  return styleforge::last_path.load(std::memory_order_relaxed);
}
