// Matrix products.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "values.h"

namespace resnet_jax {

// The axes of a product: its rows, the terms of its sums, and its columns.
enum Axis { kRows, kTerms, kColumns };
using Axes = std::array<int64_t, 3>;

// A compiled matrix product.
struct Product {
  dnnl::primitive run;
  memory::desc left, right, result, scratch;
};

// The distance in numbers between neighbours along each axis.
struct Strides {
  Axes left, right, result;
};

// Compiles a product of matrices of one type.
inline Product MakeProduct(const Axes& size, const Strides& strides, Type type,
                           Type result) {
  const auto& [m, k, n] = size;
  const auto& [left_stride, right_stride, result_stride] = strides;
  const memory::desc left({m, k}, type,
                          memory::dims{left_stride[kRows], left_stride[kTerms]});
  const memory::desc right({k, n}, type,
                           memory::dims{right_stride[kTerms], right_stride[kColumns]});
  const memory::desc product(
      {m, n}, result, memory::dims{result_stride[kRows], result_stride[kColumns]});
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const dnnl::matmul::primitive_desc made(Cpu(), left, right, product, attr);
  return {dnnl::matmul(made), left, right, product, made.scratchpad_desc()};
}

// Computes a batch of products of the last two axes of each operand. The batch is all
// other axes; one of the last two axes of each operand is contracted.
inline void RunProduct(ffi::ThreadPool& pool, int64_t left_axis, int64_t right_axis,
                       const ffi::AnyBuffer& left, const ffi::AnyBuffer& right,
                       const ffi::AnyBuffer& out) {
  const auto shape = [](const ffi::AnyBuffer& x, int64_t axis) {
    return x.dimensions()[x.dimensions().size() - 2 + axis];
  };
  const Axes size{shape(left, 1 - left_axis), shape(left, left_axis),
                  shape(right, 1 - right_axis)};
  const int64_t m = size[kRows], k = size[kTerms], n = size[kColumns];
  const Strides strides{
      left_axis == 1 ? Axes{k, 1, 0} : Axes{1, m, 0},
      right_axis == 0 ? Axes{0, n, 1} : Axes{0, 1, k},
      {n, 0, 1},
  };
  const Values given_left(left), given_right(right), wanted(out);
  const Type type = Multiplied(given_left.type);
  const int64_t products = out.element_count() / (m * n);

  // The longest axis is divided, but sums are divided only in a single product.
  const int64_t longest = std::max_element(size.begin(), size.end()) - size.begin();
  const Axis longer = m > n ? kRows : kColumns;
  const int64_t axis = longest == kTerms && products > 1 ? int64_t{longer} : longest;
  // Parts are multiples of sixteen: as many float32 numbers as a register and a cache
  // line hold.
  const int64_t threads = (Threads(pool) + products - 1) / products;
  const int64_t others = m * k * n / size[axis];
  const int64_t numbers = m * k + k * n + m * n - others;
  const Division division(size[axis],
                          PartsOf(given_left.type, threads, numbers, others), 16);
  const bool summed = axis == kTerms && division.count > 1;
  const Type sums = summed ? Type::f32 : Multiplied(wanted.type);
  const auto product_of = [&](int64_t length) -> const Product& {
    Axes part = size;
    part[axis] = length;
    const Numbers kind{left_axis,
                       right_axis,
                       axis,
                       length,
                       static_cast<int64_t>(type),
                       static_cast<int64_t>(sums)};
    return Kept<Product>({kind, {m, k, n}},
                         [&] { return MakeProduct(part, strides, type, sums); });
  };
  const Product& part = product_of(division.some);
  const Product& last = product_of(division.last());

  // An operand whose parts are contiguous is converted part by part, others at once.
  const auto taken = [&](const Values& values, const Axes& strides) {
    return strides[axis] > 1 ? values : As(pool, values, type);
  };
  const Values lefts = taken(given_left, strides.left);
  const Values rights = taken(given_right, strides.right);
  const Values results = strides.result[axis] > 1 ? wanted : Values(wanted, sums);

  // The sums of the parts are added in the place of the first one.
  std::vector<memory> summands;
  for (int64_t i = 0; summed && i < division.count; ++i) {
    const memory::desc plain({m, n}, sums, memory::format_tag::ab);
    summands.push_back(i == 0 ? memory(plain, Cpu(), results.At(0))
                              : memory(plain, Cpu()));
  }
  Share(pool, products * division.count, [&](int64_t i) {
    const int64_t product = i / division.count, place = i % division.count;
    const int64_t begin = place * division.some;
    const Product& made = place + 1 == division.count ? last : part;
    const auto offset = [&](int64_t each, const Axes& strides) {
      return product * each + begin * strides[axis];
    };
    const Slice left(made.left, lefts, offset(m * k, strides.left));
    const Slice right(made.right, rights, offset(k * n, strides.right));
    const Slice result(made.result, results, offset(m * n, strides.result));
    dnnl::stream stream(Cpu());
    made.run.execute(stream, {{DNNL_ARG_SRC, left.Read()},
                              {DNNL_ARG_WEIGHTS, right.Read()},
                              {DNNL_ARG_DST, summed ? summands[place] : result.Room()},
                              {DNNL_ARG_SCRATCHPAD, memory(made.scratch, Cpu())}});
    stream.wait();
    if (!summed) result.Write();
  });
  if (summed) Add(pool, summands);
  Convert(pool, results, wanted);
}

}  // namespace resnet_jax
