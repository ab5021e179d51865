// The passes around the matrix products of a feed-forward network, for one instruction set: rows of vectors with a bias
// that is the same for each row, or, transposed, a number for each row. Threads take rows.
#include <utility>

#include "gelu_math.h"
#include "kernels.h"
#include "tasks.h"

namespace styleforge::cpu::STYLEFORGE_CPU_ISA {
namespace {

template <typename Body>
inline void with_ffn_activation(FfnActivation activation, Body&& body) {
  switch (activation) {
    case FfnActivation::kGelu:
      return body(Constant<FfnActivation::kGelu>{});
    case FfnActivation::kGeluTanh:
      return body(Constant<FfnActivation::kGeluTanh>{});
    case FfnActivation::kRelu:
      return body(Constant<FfnActivation::kRelu>{});
    case FfnActivation::kSilu:
      return body(Constant<FfnActivation::kSilu>{});
  }
}

// body(load, store, column) for every vector of `columns` elements from `at` on; load and store take pointers to the
// vector's first element and know whether it is a whole one.
template <typename T, typename Body>
inline void for_each_vector(int64_t columns, Body&& body) {
  constexpr int kN = kLanes<T>;
  using V = Vector<Compute<T>, kN>;
  int64_t column = 0;
  for (; column + kN <= columns; column += kN) {
    body([](const T* from) -> V { return load<kN>(from); }, [](T* to, V v) { store<kN>(to, v); }, column);
  }
  if (column < columns) {
    const int some = static_cast<int>(columns - column);
    body([some](const T* from) -> V { return load_some<kN>(from, some); },
         [some](T* to, V v) { store_some<kN>(to, v, some); }, column);
  }
}

template <typename T, FfnActivation kActivation, bool kBias>
void activate_rows(const BiasActivationParams& p, int64_t begin, int64_t end) {
  constexpr int kN = kLanes<T>;
  const auto* bias = static_cast<const T*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const auto* hidden = static_cast<const T*>(p.hidden) + row * p.columns;
    auto* output = static_cast<T*>(p.output) + row * p.columns;
    for_each_vector<T>(p.columns, [&](auto load, auto store, int64_t column) {
      auto x = load(hidden + column);
      if constexpr (kBias) x += load(bias + column);
      store(output + column, ffn_activate<kActivation, sizeof(T) == 2, kN, Compute<T>>(x));
    });
  }
}

template <typename T, FfnActivation kActivation>
void activate_transposed_rows(const BiasActivationParams& p, int64_t begin, int64_t end) {
  constexpr int kN = kLanes<T>;
  const auto* biases = static_cast<const T*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const Compute<T> bias = biases == nullptr ? Compute<T>(0) : static_cast<Compute<T>>(biases[row]);
    const auto* hidden = static_cast<const T*>(p.hidden) + row * p.columns;
    auto* output = static_cast<T*>(p.output) + row * p.columns;
    for_each_vector<T>(p.columns, [&](auto load, auto store, int64_t column) {
      store(output + column, ffn_activate<kActivation, sizeof(T) == 2, kN, Compute<T>>(load(hidden + column) + bias));
    });
  }
}

template <typename T, FfnActivation kActivation>
void activation_gradient_rows(const BiasActivationBackwardParams& p, int64_t begin, int64_t end) {
  constexpr int kN = kLanes<T>;
  const auto* bias = static_cast<const T*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * p.columns;
    const auto* hidden = static_cast<const T*>(p.hidden) + at;
    for_each_vector<T>(p.columns, [&](auto load, auto store, int64_t column) {
      auto x = load(hidden + column);
      if (bias != nullptr) x += load(bias + column);
      const auto [value, slope] = ffn_activate_with_slope<kActivation, sizeof(T) == 2, kN, Compute<T>>(x);
      if (p.grad_output != nullptr) {
        const auto grad = load(static_cast<const T*>(p.grad_output) + at + column);
        store(static_cast<T*>(p.grad_hidden) + at + column, ffn_gradient<kActivation>(grad, x, slope));
      }
      if (p.output != nullptr) store(static_cast<T*>(p.output) + at + column, value);
    });
  }
}

template <typename T>
void residual_rows(const BiasResidualParams& p, int64_t begin, int64_t end) {
  const auto* bias = static_cast<const T*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const auto* residual = static_cast<const T*>(p.residual) + row * p.columns;
    auto* output = static_cast<T*>(p.output) + row * p.columns;
    for_each_vector<T>(p.columns, [&](auto load, auto store, int64_t column) {
      store(output + column, load(residual + column) + load(bias + column));
    });
  }
}

// Lanes of a block of rows and columns, kStep of them a side, change places across its diagonal.
template <int kStep, typename V, int... kLane>
inline void exchange(V& low, V& high, std::integer_sequence<int, kLane...>) {
  constexpr int kN = sizeof...(kLane);
  const V above = __builtin_shufflevector(low, high, (kLane & kStep ? kN + kLane - kStep : kLane)...);
  high = __builtin_shufflevector(low, high, (kLane & kStep ? kN + kLane : kLane + kStep)...);
  low = above;
}

// The square matrix whose rows are the vectors, transposed in place.
template <int kN, int kStep = kN / 2, typename V>
inline void transpose(V (&vectors)[kN]) {
  for (int i = 0; i < kN; ++i) {
    if ((i & kStep) == 0) exchange<kStep>(vectors[i], vectors[i + kStep], std::make_integer_sequence<int, kN>());
  }
  if constexpr (kStep > 1) transpose<kN, kStep / 2>(vectors);
}

// `columns` columns of `rows` rows of the sum, at most as many as a vector has lanes.
template <bool kWhole>
inline void sum_transposed_block(const TransposedSumParams& p, int64_t row, int rows, int64_t column, int columns) {
  constexpr int kN = kLanes<float>;
  using V = Vector<float, kN>;
  const auto take = [](const float* from, int some) { return kWhole ? load<kN>(from) : load_some<kN>(from, some); };
  const auto* product = static_cast<const float*>(p.product) + column * p.rows + row;
  V vectors[kN];
  for (int i = 0; i < kN; ++i) vectors[i] = kWhole || i < columns ? take(product + i * p.rows, rows) : V{};
  transpose(vectors);
  const V bias = p.bias == nullptr ? V{} : take(static_cast<const float*>(p.bias) + column, columns);
  for (int i = 0; i < (kWhole ? kN : rows); ++i) {
    const int64_t at = (row + i) * p.columns + column;
    V sum = vectors[i] + bias;
    if (p.residual != nullptr) sum += take(static_cast<const float*>(p.residual) + at, columns);
    if constexpr (kWhole) {
      store<kN>(static_cast<float*>(p.output) + at, sum);
    } else {
      store_some<kN>(static_cast<float*>(p.output) + at, sum, columns);
    }
  }
}

}  // namespace

void bias_activation(const BiasActivationParams& params, ParallelFor parallel_for) {
  with_dtype(params.dtype, [&](auto zero) {
    with_ffn_activation(params.activation, [&](auto activation) {
      with_bool(params.bias != nullptr, [&](auto bias) {
        run_tasks(parallel_for, params.rows, params.columns, [&](int64_t begin, int64_t end) {
          activate_rows<decltype(zero), activation.value, bias.value>(params, begin, end);
        });
      });
    });
  });
}

void transposed_bias_activation(const BiasActivationParams& params, ParallelFor parallel_for) {
  with_ffn_activation(params.activation, [&](auto activation) {
    run_tasks(parallel_for, params.rows, params.columns, [&](int64_t begin, int64_t end) {
      activate_transposed_rows<float, activation.value>(params, begin, end);
    });
  });
}

void bias_activation_backward(const BiasActivationBackwardParams& params, ParallelFor parallel_for) {
  with_dtype(params.dtype, [&](auto zero) {
    with_ffn_activation(params.activation, [&](auto activation) {
      run_tasks(parallel_for, params.rows, params.columns, [&](int64_t begin, int64_t end) {
        activation_gradient_rows<decltype(zero), activation.value>(params, begin, end);
      });
    });
  });
}

void bias_residual(const BiasResidualParams& params, ParallelFor parallel_for) {
  with_dtype(params.dtype, [&](auto zero) {
    run_tasks(parallel_for, params.rows, params.columns,
              [&](int64_t begin, int64_t end) { residual_rows<decltype(zero)>(params, begin, end); });
  });
}

void transposed_sum(const TransposedSumParams& params, ParallelFor parallel_for) {
  constexpr int64_t kN = kLanes<float>;
  run_tasks(parallel_for, ceil_div(params.rows, kN), kN * params.columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kN; row < min(end * kN, params.rows); row += kN) {
      const int rows = static_cast<int>(min(kN, params.rows - row));
      for (int64_t column = 0; column < params.columns; column += kN) {
        const int columns = static_cast<int>(min(kN, params.columns - column));
        if (rows == kN && columns == kN) {
          sum_transposed_block<true>(params, row, rows, column, columns);
        } else {
          sum_transposed_block<false>(params, row, rows, column, columns);
        }
      }
    }
  });
}

}  // namespace styleforge::cpu::STYLEFORGE_CPU_ISA
