// Mean and sum of squared deviations (M2). Short chunks, which stay in the first-level cache between the two passes,
// give mean and then M2; chunks are merged by T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample
// variance" (1983). All sums are in double: on a memory-bound kernel that costs nothing, and the statistics are then
// those that PyTorch (which also sums in double) has, or better. The order of every sum is fixed by the sizes alone.
#pragma once

#include "tasks.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;
};

inline void merge(Moments& a, const Moments& b) {
  if (a.count == 0) {
    a = b;
    return;
  }
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  a.mean += delta * (b.count / count);
  a.m2 += b.m2 + delta * delta * (a.count * b.count / count);
  a.count = count;
}

constexpr int64_t kChunkElements = 4096;
constexpr int64_t kBlockElements = 8 * kChunkElements;

template <typename T>
inline Moments chunk_moments(const T* x, int64_t count) {
  using D = Vector<double, kDoubles>;
  constexpr int kUnroll = 4;
  const int64_t whole = count / (kUnroll * kDoubles) * (kUnroll * kDoubles);
  D sums[kUnroll] = {};
  for (int64_t i = 0; i < whole; i += kUnroll * kDoubles) {
    for (int u = 0; u < kUnroll; ++u) sums[u] += load_doubles(x + i + u * kDoubles);
  }
  double sum = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = whole; i < count; ++i) sum += to_double(x[i]);

  Moments result{static_cast<double>(count), sum / static_cast<double>(count), 0};
  D squares[kUnroll] = {};
  for (int64_t i = 0; i < whole; i += kUnroll * kDoubles) {
    for (int u = 0; u < kUnroll; ++u) {
      const D d = load_doubles(x + i + u * kDoubles) - result.mean;
      squares[u] += d * d;
    }
  }
  result.m2 = horizontal_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (int64_t i = whole; i < count; ++i) {
    const double d = to_double(x[i]) - result.mean;
    result.m2 += d * d;
  }
  return result;
}

// At most kBlockElements consecutive elements.
template <typename T>
inline Moments block_moments(const T* x, int64_t count) {
  Moments result;
  for (int64_t i = 0; i < count; i += kChunkElements) {
    merge(result, chunk_moments(x + i, min(kChunkElements, count - i)));
  }
  return result;
}

// Merges the moments of `width` columns, all with the same counts, into mean[width], m2[width].
inline void merge_columns(double* mean, double* m2, double count, const double* other_mean, const double* other_m2,
                          double other_count, int64_t width) {
  const double share = other_count / (count + other_count), weight = count * share;
  for (int64_t j = 0; j < width; ++j) {
    const double delta = other_mean[j] - mean[j];
    mean[j] += delta * share;
    m2[j] += other_m2[j] + delta * delta * weight;
  }
}

// Per-channel moments of channels_last pixels, which come in any number of calls.
template <typename T>
class ColumnMoments {
 public:
  explicit ColumnMoments(const RowView<T>& view) : view_(view), mean_(view.width), m2_(view.width) { reset(); }

  void reset() {
    rows_ = rest_ = 0;
    for (int64_t j = 0; j < view_.width; ++j) mean_[j] = m2_[j] = 0;
  }

  // `pixels` consecutive pixels. A call that leaves a partial row of the view must be the last before result().
  void add(const T* x, int64_t pixels) {
    const int64_t rows = view_.rows(pixels);
    for (int64_t r = 0; r < rows; r += kChunkRows) {
      const int64_t here = min(kChunkRows, rows - r);
      add_chunk(x + r * view_.width, here);
      rows_ += here;
    }
    rest_ = view_.rest(pixels);
    const T* tail = x + rows * view_.width;
    const auto before = static_cast<double>(rows_);
    for (int64_t j = 0; j < rest_; ++j) {
      const double delta = to_double(tail[j]) - mean_[j];
      mean_[j] += delta / (before + 1);
      m2_[j] += delta * (before / (before + 1)) * delta;
    }
  }

  // Writes mean[channels] and m2[channels]; returns the number of pixels. The state is spent: reset() before more.
  double result(double* mean, double* m2) {
    const int64_t channels = view_.channels;
    double count = 0;
    for (int64_t first = 0; first < view_.width; first += channels) {
      const auto here = static_cast<double>(rows_ + (first < rest_));
      if (first == 0) {
        std::memcpy(mean, mean_, static_cast<size_t>(channels) * sizeof(double));
        std::memcpy(m2, m2_, static_cast<size_t>(channels) * sizeof(double));
      } else if (here > 0) {
        merge_columns(mean, m2, count, mean_ + first, m2_ + first, here, channels);
      }
      count += here;
    }
    return count;
  }

 private:
  using D = Vector<double, kDoubles>;
  static constexpr int64_t kChunkRows = 64;

  void add_chunk(const T* x, int64_t rows) {
    int64_t j = 0;
    for (; j + 8 * kDoubles <= view_.width; j += 8 * kDoubles) add_columns<8, false>(x, rows, j, kDoubles);
    for (; j + 4 * kDoubles <= view_.width; j += 4 * kDoubles) add_columns<4, false>(x, rows, j, kDoubles);
    for (; j + 2 * kDoubles <= view_.width; j += 2 * kDoubles) add_columns<2, false>(x, rows, j, kDoubles);
    for (; j + kDoubles <= view_.width; j += kDoubles) add_columns<1, false>(x, rows, j, kDoubles);
    if (j < view_.width) add_columns<1, true>(x, rows, j, static_cast<int>(view_.width - j));
  }

  template <int kGroup, bool kPartial>
  void add_columns(const T* x, int64_t rows, int64_t j, int columns) {
    const auto load_at = [&](int64_t r, int g) {
      const T* from = x + r * view_.width + j + g * kDoubles;
      if constexpr (kPartial) {
        return __builtin_convertvector(load_some<kDoubles>(from, columns), D);
      } else {
        return load_doubles(from);
      }
    };
    D mean[kGroup] = {}, m2[kGroup] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int g = 0; g < kGroup; ++g) mean[g] += load_at(r, g);
    }
    for (int g = 0; g < kGroup; ++g) mean[g] /= static_cast<double>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int g = 0; g < kGroup; ++g) {
        const D d = load_at(r, g) - mean[g];
        m2[g] += d * d;
      }
    }
    const auto before = static_cast<double>(rows_), here = static_cast<double>(rows);
    for (int g = 0; g < kGroup; ++g) {
      double* mean_at = mean_ + (j + g * kDoubles);
      double* m2_at = m2_ + (j + g * kDoubles);
      const auto load_state = [&](const double* from) {
        return kPartial ? load_some<kDoubles>(from, columns) : load<kDoubles>(from);
      };
      const auto store_state = [&](double* to, D value) {
        kPartial ? store_some<kDoubles>(to, value, columns) : store<kDoubles>(to, value);
      };
      const D old = load_state(mean_at);
      const D delta = mean[g] - old;
      // The weight first: of the first rows it is 0, and the square of a large mean may be infinite.
      store_state(m2_at, load_state(m2_at) + m2[g] + delta * (before * here / (before + here)) * delta);
      store_state(mean_at, old + delta * (here / (before + here)));
    }
  }

  RowView<T> view_;
  Buffer<double> mean_, m2_;
  int64_t rows_ = 0, rest_ = 0;
};

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
