// What the environment asks of a schedule, read once a call: schedules are on every call's way, and a look at the
// environment is not free. STYLEFORGE_PATH names a path that tests force; a second variable, of the operator's own,
// holds "key=number,key=number" for what bench/tune.py tries. 0 or absent: as the schedule chooses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace styleforge::cuda {

struct Overrides {
  const char* path = std::getenv("STYLEFORGE_PATH");
  const char* tune;

  explicit Overrides(const char* tune_variable) : tune(std::getenv(tune_variable)) {}

  bool forced() const { return path != nullptr && *path != '\0'; }
  bool forced(const char* name) const { return path != nullptr && std::strcmp(path, name) == 0; }

  int64_t tuned(const char* key, int64_t chosen) const {
    const char* at = tune == nullptr ? nullptr : std::strstr(tune, key);
    if (at == nullptr) return chosen;
    const int64_t wanted = std::atoll(at + std::strlen(key) + 1);
    return wanted > 0 ? wanted : chosen;
  }
};

}  // namespace styleforge::cuda
