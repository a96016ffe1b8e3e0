// Convolutions, and their gradients by image and kernel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "shared.h"

namespace resnet_jax {

enum Direction : int64_t { kForward, kInput, kKernel };

// A direction of a convolution of some images, or of some rows of them, compiled.
struct Part {
  dnnl::primitive run;
  memory::desc image, output, scratch;
  int64_t image_begin = 0, output_begin = 0;  // How many numbers lie before it.
};

struct Window {
  memory::dims stride, dilation, before, behind;
  int64_t span;
};

inline Part Compile(Direction direction, const memory::dims& image,
                    const memory::dims& output, const memory::desc& kernel,
                    memory::data_type type, const Window& window,
                    memory::desc* wanted) {
  const auto& [stride, dilation, before, behind, span] = window;
  const memory::desc x(image, type, memory::format_tag::nhwc);
  const memory::desc y(output, type, memory::format_tag::nhwc);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const auto direct = dnnl::algorithm::convolution_direct;
  const auto kind = direction == kForward ? dnnl::prop_kind::forward_inference
                                          : dnnl::prop_kind::forward_training;
  if (direction == kForward) {
    const dnnl::convolution_forward::primitive_desc made(
        Cpu(), kind, direct, x, kernel, y, stride, dilation, before, behind, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_forward(made), x, y, made.scratchpad_desc()};
  }
  const memory::desc any(kernel.get_dims(), type, memory::format_tag::any);
  const dnnl::convolution_forward::primitive_desc forward(
      Cpu(), kind, direct, x, any, y, stride, dilation, before, behind);
  if (direction == kInput) {
    const dnnl::convolution_backward_data::primitive_desc made(
        Cpu(), direct, x, kernel, y, stride, dilation, before, behind, forward, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_backward_data(made), x, y, made.scratchpad_desc()};
  }
  const dnnl::convolution_backward_weights::primitive_desc made(
      Cpu(), direct, x, kernel, y, stride, dilation, before, behind, forward, attr);
  *wanted = made.diff_weights_desc();
  return {dnnl::convolution_backward_weights(made), x, y, made.scratchpad_desc()};
}

struct Convolution {
  memory::desc given, kernel;  // The kernel as XLA has it, and as oneDNN wants it.
  std::vector<Part> parts;
};

// Leaves some rows of an output, and what they see of the image; returns its first row.
inline int64_t TakeRows(int64_t begin, int64_t count, memory::dims* image,
                        memory::dims* output, Window* window) {
  int64_t& height = (*image)[2];
  const int64_t first = begin * window->stride[0] - window->before[0];
  const int64_t end = first + (count - 1) * window->stride[0] + window->span;
  const int64_t seen = std::max<int64_t>(first, 0), seen_end = std::min(end, height);
  window->before[0] = seen - first;
  window->behind[0] = end - seen_end;
  height = seen_end - seen;
  (*output)[2] = count;
  return seen;
}

inline Convolution MakeConvolution(Direction direction, int64_t threads,
                                   const memory::dims& image,
                                   const memory::dims& output,
                                   const memory::dims& kernel, memory::data_type type,
                                   const Numbers& where) {
  Convolution made;
  made.given = memory::desc(kernel, type, memory::format_tag::hwio);
  // Sums over images are of float32.
  const auto sums = direction == kKernel ? memory::data_type::f32 : type;
  made.kernel = memory::desc(kernel, sums, memory::format_tag::any);
  const int64_t span = where[1] * (kernel[2] - 1) + 1;
  const Window window{{where[0], where[0]},
                      {where[1] - 1, where[1] - 1},
                      {where[2], where[4]},
                      {where[3], where[5]},
                      span};
  const Division images(image[0], threads);
  // Images that are fewer than threads are divided, if all rows see some of them.
  const bool divides = direction == kForward && std::max(where[2], where[3]) < span;
  const Division rows(output[2],
                      divides ? std::max<int64_t>(threads / image[0], 1) : 1);
  for (int64_t i = 0; i < images.count * rows.count; ++i) {
    const int64_t begin = i / rows.count * images.some;
    const int64_t row = i % rows.count * rows.some;
    memory::dims x = image, y = output;
    Window seen = window;
    x[0] = y[0] = std::min(images.some, image[0] - begin);
    int64_t first = 0;
    if (rows.count > 1) {
      first = TakeRows(row, std::min(rows.some, output[2] - row), &x, &y, &seen);
    }
    Part part = Compile(direction, x, y, made.kernel, type, seen, &made.kernel);
    part.image_begin = (begin * image[2] + first) * image[3] * image[1];
    part.output_begin = (begin * output[2] + row) * output[3] * output[1];
    made.parts.push_back(std::move(part));
  }
  return made;
}

inline memory::dims Image(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[0], d[3], d[1], d[2]};
}

inline memory::dims Kernel(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[3], d[2], d[0], d[1]};
}

inline void RunConvolution(ffi::ThreadPool& pool, Direction direction,
                           const Numbers& where, const ffi::AnyBuffer& one,
                           const ffi::AnyBuffer& other, const ffi::AnyBuffer& out) {
  const bool forward = direction == kForward, gradient = direction == kKernel;
  const ffi::AnyBuffer& x = direction == kInput ? out : one;
  const ffi::AnyBuffer& k = gradient ? out : other;
  const ffi::AnyBuffer& y = forward ? out : direction == kInput ? one : other;
  const auto type = TypeOf(one);
  const memory::dims image = Image(x), output = Image(y), kernel = Kernel(k);
  const int64_t threads = Threads(pool);
  const Numbers kind{direction, threads, static_cast<int64_t>(type)};
  const auto& made = Kept<Convolution>({kind, where, image, kernel, output}, [&] {
    return MakeConvolution(direction, threads, image, output, kernel, type, where);
  });
  const int64_t count = made.parts.size();

  const memory given(made.given, Cpu(), k.untyped_data());
  const bool as_given = made.kernel == made.given;
  std::vector<memory> kernels;
  for (int64_t i = 0; i < (gradient ? count : 1); ++i) {
    kernels.push_back(as_given && i == 0 ? given : memory(made.kernel, Cpu()));
  }
  if (!gradient && !as_given) Reorder(given, kernels[0]);

  Share(pool, count, [&](int64_t i) {
    const Part& part = made.parts[i];
    dnnl::stream stream(Cpu());
    part.run.execute(stream, {{direction == kInput ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC,
                               At(part.image, x, part.image_begin)},
                              {gradient ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS,
                               kernels[gradient ? i : 0]},
                              {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST,
                               At(part.output, y, part.output_begin)},
                              {DNNL_ARG_SCRATCHPAD, memory(part.scratch, Cpu())}});
    stream.wait();
  });
  if (!gradient) return;
  Add(pool, kernels);
  if (!as_given) Reorder(kernels[0], given);
}

}  // namespace resnet_jax
