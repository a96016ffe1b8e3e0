// Reordering of kernels: oneDNN wants their numbers in another order than XLA.

#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "values.h"

namespace resnet_jax {

// Returns whether an order has blocks of bfloat16 in which two inputs are adjacent for
// each output.
inline bool PairsInputs(const memory::desc& order) {
  if (order.get_data_type() != Type::bf16) return false;
  if (order.get_inner_idxs() != memory::dims{1, 0, 1}) return false;
  const memory::dims blocks = order.get_inner_blks(), size = order.get_dims();
  return blocks[2] == 2 && size[0] % blocks[1] == 0 && size[1] % (2 * blocks[0]) == 0;
}

// Interleaves two rows of bfloat16, or of float32, which are rounded.
FOR_EVERY_CPU static void Interleave(const uint16_t* left, const uint16_t* right,
                                     uint32_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = left[i] | uint32_t{right[i]} << 16;
}

FOR_EVERY_CPU static void Interleave(const float* left, const float* right,
                                     uint32_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = Rounded(left[i]) | uint32_t{Rounded(right[i])} << 16;
  }
}

// Reorders a kernel whose outputs are adjacent into blocks that pair its inputs.
template <typename Number>
inline void PairInputs(ffi::ThreadPool& pool, const Number* kernel, const memory& to) {
  const memory::desc order = to.get_desc();
  const memory::dims size = order.get_dims(), strides = order.get_strides();
  const memory::dims blocks = order.get_inner_blks();
  const int64_t outputs = size[0], of_tap = size[1] / 2, width = size[3];
  auto* put = static_cast<uint16_t*>(to.get_data_handle());
  const Division pairs(size[2] * width * of_tap, Threads(pool));
  Share(pool, pairs.count, [&](int64_t i) {
    const int64_t end = std::min(pairs.length, (i + 1) * pairs.some);
    for (int64_t pair = i * pairs.some; pair < end; ++pair) {
      const int64_t tap = pair / of_tap, place = pair % of_tap;
      const Number* row = kernel + pair * 2 * outputs;
      uint16_t* block = put + tap / width * strides[2] + tap % width * strides[3] +
                        place / blocks[0] * strides[1] +
                        place % blocks[0] * 2 * blocks[1];
      for (int64_t first = 0; first < outputs; first += blocks[1]) {
        Interleave(row + first, row + outputs + first,
                   reinterpret_cast<uint32_t*>(block), blocks[1]);
        block += strides[0];
      }
    }
  });
}

// Returns how many neighbours along an axis are in one block.
inline int64_t BlockOf(const memory::desc& order, int64_t axis) {
  const memory::dims axes = order.get_inner_idxs(), blocks = order.get_inner_blks();
  int64_t block = 1;
  for (size_t i = 0; i < axes.size(); ++i) block *= axes[i] == axis ? blocks[i] : 1;
  return block;
}

// Reorders a kernel and converts it to another type.
inline void Reorder(ffi::ThreadPool& pool, const memory& from, const memory& to) {
  const memory::desc read = from.get_desc(), written = to.get_desc();
  if (PairsInputs(written)) {
    const void* kernel = from.get_data_handle();
    if (read.get_data_type() == Type::f32) {
      return PairInputs(pool, static_cast<const float*>(kernel), to);
    }
    return PairInputs(pool, static_cast<const uint16_t*>(kernel), to);
  }
  // If all blocks are full, the longer axis of outputs and inputs is divided among the
  // threads.
  const memory::dims size = written.get_dims();
  const int64_t axis = size[0] >= size[1] ? 0 : 1;
  const bool full = read.get_padded_dims() == size && written.get_padded_dims() == size;
  const Division some(size[axis], full ? Threads(pool) : 1,
                      BlockOf(read, axis) * BlockOf(written, axis));
  Share(pool, some.count, [&](int64_t i) {
    memory::dims begin(size.size(), 0), part = size;
    begin[axis] = i * some.some;
    part[axis] = i + 1 == some.count ? some.last() : some.some;
    const auto part_of = [&](const memory& all) {
      const memory::desc desc = all.get_desc();
      return memory(full ? desc.submemory_desc(part, begin) : desc, Cpu(),
                    all.get_data_handle());
    };
    memory here = part_of(from), there = part_of(to);
    dnnl::stream stream(Cpu());
    dnnl::reorder(here, there).execute(stream, here, there);
    stream.wait();
  });
}

}  // namespace resnet_jax
