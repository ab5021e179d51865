// Padding + nearest upsampling. A task is one output row (NCHW: of one channel); rows are built from whole pixels, and
// the second row of an upsampled pair is a copy of the first, still in cache.
#include "pad.h"

#include <cstring>

namespace styleforge::cpu {
namespace {

// The input index that output index `index` reads, or -1 for a zero.
int64_t source(int64_t index, int64_t pad, int64_t size, int upsample, PaddingMode mode) {
  const int64_t upsampled = size * upsample;
  int64_t at = index - pad;
  if (at < 0 || at >= upsampled) {
    if (mode == PaddingMode::kZeros) return -1;
    if (mode == PaddingMode::kReflect) {
      at = at < 0 ? -at : 2 * (upsampled - 1) - at;
    } else {
      at = at < 0 ? 0 : upsampled - 1;
    }
  }
  return at / upsample;
}

template <typename Element>
class Pad {
 public:
  explicit Pad(const PadParams& p) : p_(p) {}

  void run(ParallelFor parallel_for) const {
    const int64_t planes = p_.batch * (p_.channels_last ? 1 : p_.channels);
    const int64_t row_elements = p_.out_width * (p_.channels_last ? p_.out_channels : 1);
    const int64_t grain = 32768 / (row_elements > 0 ? row_elements : 1) + 1;
    parallel_for(
        planes * p_.out_height, grain,
        [](int64_t begin, int64_t end, void* self) { static_cast<const Pad*>(self)->rows(begin, end); },
        const_cast<Pad*>(this));
  }

 private:
  void rows(int64_t begin, int64_t end) const {
    const int64_t in_pixel = p_.channels_last ? p_.channels : 1, out_pixel = p_.channels_last ? p_.out_channels : 1;
    const int64_t in_row = p_.width * in_pixel, out_row = p_.out_width * out_pixel;
    const auto* input = static_cast<const Element*>(p_.input);
    auto* output = static_cast<Element*>(p_.output);
    const Element* previous = nullptr;  // the input row that the output row above was made from
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / p_.out_height, y = task % p_.out_height;
      const int64_t source_y = source(y, p_.pad_top, p_.height, p_.upsample, p_.mode);
      Element* to = output + task * out_row;
      if (source_y < 0) {
        std::memset(to, 0, static_cast<size_t>(out_row) * sizeof(Element));
        previous = nullptr;
        continue;
      }
      const Element* from = input + (plane * p_.height + source_y) * in_row;
      if (from == previous) {
        std::memcpy(to, to - out_row, static_cast<size_t>(out_row) * sizeof(Element));
      } else {
        row(from, to, in_pixel, out_pixel);
        previous = from;
      }
    }
  }

  void row(const Element* from, Element* to, int64_t in_pixel, int64_t out_pixel) const {
    const int64_t left = p_.pad_left < p_.out_width ? p_.pad_left : p_.out_width;
    const int64_t inner_end =
        left + p_.width * p_.upsample < p_.out_width ? left + p_.width * p_.upsample : p_.out_width;
    for (int64_t x = 0; x < left; ++x) edge_pixel(from, to, x, in_pixel, out_pixel);
    inner(from, to + left * out_pixel, inner_end - left, in_pixel, out_pixel);
    for (int64_t x = inner_end; x < p_.out_width; ++x) edge_pixel(from, to, x, in_pixel, out_pixel);
  }

  void inner(const Element* from, Element* to, int64_t count, int64_t in_pixel, int64_t out_pixel) const {
    if (p_.upsample == 1 && in_pixel == out_pixel) {
      std::memcpy(to, from, static_cast<size_t>(count * in_pixel) * sizeof(Element));
    } else if (in_pixel == 1 && out_pixel == 1) {  // upsample 2
      for (int64_t x = 0; x < count / 2; ++x) to[2 * x] = to[2 * x + 1] = from[x];
    } else {
      for (int64_t x = 0; x < count; ++x) {
        pixel(from + (p_.upsample == 2 ? x / 2 : x) * in_pixel, to + x * out_pixel, in_pixel, out_pixel);
      }
    }
  }

  void edge_pixel(const Element* from, Element* to, int64_t x, int64_t in_pixel, int64_t out_pixel) const {
    const int64_t source_x = source(x, p_.pad_left, p_.width, p_.upsample, p_.mode);
    if (source_x < 0) {
      std::memset(to + x * out_pixel, 0, static_cast<size_t>(out_pixel) * sizeof(Element));
    } else {
      pixel(from + source_x * in_pixel, to + x * out_pixel, in_pixel, out_pixel);
    }
  }

  static void pixel(const Element* from, Element* to, int64_t in_pixel, int64_t out_pixel) {
    if (in_pixel < 16) {  // a call of memcpy costs more than these
      for (int64_t c = 0; c < in_pixel; ++c) to[c] = from[c];
    } else {
      std::memcpy(to, from, static_cast<size_t>(in_pixel) * sizeof(Element));
    }
    for (int64_t c = in_pixel; c < out_pixel; ++c) to[c] = 0;
  }

  const PadParams& p_;
};

}  // namespace

void pad_upsample(const PadParams& params, ParallelFor parallel_for) {
  switch (params.element_size) {
    case 2:
      return Pad<uint16_t>(params).run(parallel_for);
    case 4:
      return Pad<uint32_t>(params).run(parallel_for);
    case 8:
      return Pad<uint64_t>(params).run(parallel_for);
  }
}

}  // namespace styleforge::cpu
