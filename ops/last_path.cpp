// The path of the most recent operator call. One for the process, so only libstyleforge.so has it.
#include "checks.h"

#include <atomic>

namespace styleforge {
namespace {
std::atomic<const char*> last_path{""};
std::atomic<const char*> last_stage{""};
}  // namespace

void record_path(const char* path, const char* stage) {
  last_path.store(path, std::memory_order_relaxed);
  last_stage.store(stage, std::memory_order_relaxed);
}

}  // namespace styleforge

// Read by Python through ctypes: "operator:device:path", and after a "+" the path of the norm it ends in.
extern "C" STYLEFORGE_API const char* styleforge_last_path() {
  thread_local std::string text;
  text = styleforge::last_path.load(std::memory_order_relaxed);
  const char* stage = styleforge::last_stage.load(std::memory_order_relaxed);
  if (*stage != '\0') text.append("+").append(stage);
  return text.c_str();
}
