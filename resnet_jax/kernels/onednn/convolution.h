// Convolutions, and their gradients with respect to images and kernel.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "order.h"
#include "values.h"

namespace resnet_jax {

// What is computed: the output, or the gradient with respect to images or kernel.
enum Direction : int64_t { kForward, kInput, kKernel };

// A compiled direction of a convolution of some images, or of some of their rows.
struct Part {
  dnnl::primitive run;
  memory::desc image, output, scratch;
  int64_t image_begin = 0, output_begin = 0;  // Offsets in numbers.
};

// Returns the number of elements of a shape.
inline int64_t Count(const memory::dims& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// Stride, dilation and padding of a convolution as oneDNN counts them. `span` is the
// number of pixels from a window's first tap to its last one.
struct Window {
  memory::dims stride, dilation, before, after;
  int64_t span;
};

// Compiles a direction. The kernel's order is oneDNN's choice, returned in `wanted`.
inline Part Compile(Direction direction, const memory::dims& image,
                    const memory::dims& output, const memory::desc& kernel, Type type,
                    const Window& window, memory::desc* wanted) {
  const auto& [stride, dilation, before, after, span] = window;
  const memory::desc x(image, type, memory::format_tag::nhwc);
  const memory::desc y(output, type, memory::format_tag::nhwc);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const auto direct = dnnl::algorithm::convolution_direct;
  const auto kind = direction == kForward ? dnnl::prop_kind::forward_inference
                                          : dnnl::prop_kind::forward_training;
  if (direction == kForward) {
    const dnnl::convolution_forward::primitive_desc made(
        Cpu(), kind, direct, x, kernel, y, stride, dilation, before, after, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_forward(made), x, y, made.scratchpad_desc()};
  }
  const memory::desc any(kernel.get_dims(), type, memory::format_tag::any);
  const dnnl::convolution_forward::primitive_desc forward(
      Cpu(), kind, direct, x, any, y, stride, dilation, before, after);
  if (direction == kInput) {
    const dnnl::convolution_backward_data::primitive_desc made(
        Cpu(), direct, x, kernel, y, stride, dilation, before, after, forward, attr);
    *wanted = made.weights_desc();
    return {dnnl::convolution_backward_data(made), x, y, made.scratchpad_desc()};
  }
  const dnnl::convolution_backward_weights::primitive_desc made(
      Cpu(), direct, x, kernel, y, stride, dilation, before, after, forward, attr);
  *wanted = made.diff_weights_desc();
  return {dnnl::convolution_backward_weights(made), x, y, made.scratchpad_desc()};
}

// A compiled direction of a convolution, divided into parts for the threads.
struct Convolution {
  memory::desc given, kernel;  // The kernel in XLA's order and in oneDNN's.
  std::vector<Part> parts;
};

// Restricts a convolution to some rows of the output and the rows of the image that
// they see. Returns the first of these.
inline int64_t TakeOutputRows(int64_t begin, int64_t count, memory::dims* image,
                              memory::dims* output, Window* window) {
  int64_t& height = (*image)[2];
  const int64_t first = begin * window->stride[0] - window->before[0];
  const int64_t end = first + (count - 1) * window->stride[0] + window->span;
  const int64_t seen = std::max<int64_t>(first, 0), seen_end = std::min(end, height);
  window->before[0] = seen - first;
  window->after[0] = end - seen_end;
  height = seen_end - seen;
  (*output)[2] = count;
  return seen;
}

// Restricts a convolution of stride one to some rows of the image and the rows of the
// output that see them. Returns the first of these.
inline int64_t TakeImageRows(int64_t begin, int64_t count, memory::dims* image,
                             memory::dims* output, Window* window) {
  int64_t& height = (*output)[2];
  const int64_t before = window->before[0], end = begin + count;
  const int64_t seeing = std::max<int64_t>(begin + before - window->span + 1, 0);
  const int64_t seeing_end = std::min(end + before, height);
  window->before[0] = begin + before - seeing;
  window->after[0] = seeing_end - 1 - before + window->span - end;
  height = seeing_end - seeing;
  (*image)[2] = count;
  return seeing;
}

// Compiles a direction for images stored as one type and a kernel given as another.
inline Convolution MakeConvolution(Direction direction, int64_t threads,
                                   const memory::dims& image,
                                   const memory::dims& output,
                                   const memory::dims& kernel, Type stored, Type given,
                                   const Numbers& geometry) {
  Convolution made;
  const Type type = Multiplied(stored);
  // Sums over images are float32.
  const Type of_kernel = direction == kKernel ? Type::f32 : type;
  // A kernel that is multiplied in the type of the images is rounded by the reorder.
  const bool as_given = direction != kKernel && type == stored;
  made.given =
      memory::desc(kernel, as_given ? given : of_kernel, memory::format_tag::hwio);
  made.kernel = memory::desc(kernel, of_kernel, memory::format_tag::any);
  const int64_t span = geometry[1] * (kernel[2] - 1) + 1;
  const Window window{{geometry[0], geometry[0]},
                      {geometry[1] - 1, geometry[1] - 1},
                      {geometry[2], geometry[4]},
                      {geometry[3], geometry[5]},
                      span};
  const int64_t numbers = Count(image) + Count(output);
  const Division images(image[0], PartsOf(stored, threads, numbers, Count(kernel)));
  // If there are fewer images than threads, each image is divided by rows: rows of the
  // image for its gradient, otherwise rows of the output, provided that each of these
  // sees some of the image.
  const bool input = direction == kInput;
  const bool divides =
      input ? geometry[0] == 1 : std::max(geometry[2], geometry[3]) < span;
  const Division rows(input ? image[2] : output[2],
                      divides ? std::max<int64_t>(threads / image[0], 1) : 1);
  for (int64_t i = 0; i < images.count * rows.count; ++i) {
    const int64_t begin = i / rows.count * images.some;
    const int64_t row = i % rows.count * rows.some;
    memory::dims x = image, y = output;
    Window seen = window;
    x[0] = y[0] = std::min(images.some, image[0] - begin);
    int64_t x_row = row, y_row = row;
    if (rows.count > 1) {
      const int64_t some = std::min(rows.some, rows.length - row);
      if (input) {
        y_row = TakeImageRows(row, some, &x, &y, &seen);
      } else {
        x_row = TakeOutputRows(row, some, &x, &y, &seen);
      }
    }
    Part part = Compile(direction, x, y, made.kernel, type, seen, &made.kernel);
    part.image_begin = (begin * image[2] + x_row) * image[3] * image[1];
    part.output_begin = (begin * output[2] + y_row) * output[3] * output[1];
    made.parts.push_back(std::move(part));
  }
  return made;
}

// Returns the shape of an NHWC buffer in oneDNN's order of axes.
inline memory::dims Image(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[0], d[3], d[1], d[2]};
}

// Returns the shape of an HWIO buffer in oneDNN's order of axes.
inline memory::dims Kernel(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[3], d[2], d[0], d[1]};
}

// Computes a direction of a convolution, as `__init__.py` describes it.
inline void RunConvolution(ffi::ThreadPool& pool, Direction direction,
                           const Numbers& geometry, const ffi::AnyBuffer& left,
                           const ffi::AnyBuffer& right, const ffi::AnyBuffer& out) {
  const bool forward = direction == kForward, gradient = direction == kKernel;
  const ffi::AnyBuffer& x = direction == kInput ? out : left;
  const ffi::AnyBuffer& k = gradient ? out : right;
  const ffi::AnyBuffer& y = forward ? out : direction == kInput ? left : right;
  const Values images(x), outputs(y), given(k);
  const memory::dims image = Image(x), output = Image(y), kernel = Kernel(k);
  const Type stored = images.type;
  const int64_t threads = Threads(pool);
  const Numbers kind{direction, threads, static_cast<int64_t>(stored),
                     static_cast<int64_t>(given.type)};
  const auto& made = Kept<Convolution>({kind, geometry, image, kernel, output}, [&] {
    return MakeConvolution(direction, threads, image, output, kernel, stored,
                           given.type, geometry);
  });
  const int64_t count = made.parts.size();

  const Type of_kernel = made.given.get_data_type();
  const Values taken = gradient ? Values(given, of_kernel) : As(pool, given, of_kernel);
  const memory plain(made.given, Cpu(), taken.At(0));
  const bool as_given = made.kernel == made.given;
  std::vector<memory> kernels;
  for (int64_t i = 0; i < (gradient ? count : 1); ++i) {
    kernels.push_back(as_given && i == 0 ? plain : memory(made.kernel, Cpu()));
  }
  if (!gradient && !as_given) Reorder(pool, plain, kernels[0]);

  Share(pool, count, [&](int64_t i) {
    const Part& part = made.parts[i];
    const Slice seen(part.image, images, part.image_begin);
    const Slice put(part.output, outputs, part.output_begin);
    dnnl::stream stream(Cpu());
    part.run.execute(stream, {{direction == kInput ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC,
                               direction == kInput ? seen.Room() : seen.Read()},
                              {gradient ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS,
                               kernels[gradient ? i : 0]},
                              {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST,
                               forward ? put.Room() : put.Read()},
                              {DNNL_ARG_SCRATCHPAD, memory(part.scratch, Cpu())}});
    stream.wait();
    if (direction == kInput) seen.Write();
    if (forward) put.Write();
  });
  if (!gradient) return;
  Add(pool, kernels);
  if (!as_given) Reorder(pool, kernels[0], plain);
  Convert(pool, taken, given);
}

}  // namespace resnet_jax
