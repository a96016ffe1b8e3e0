// oneDNN's convolutions and products as custom calls of XLA on CPUs; onednn.py builds
// and calls them.

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

#if DNNL_VERSION_MAJOR != 3 || DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP
#error "needs oneDNN 3 with OpenMP"
#endif

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Numbers = std::vector<int64_t>;

enum Direction : int64_t { kForward, kInput, kKernel };

const dnnl::engine& Cpu() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

// XLA's threads share the work; OpenMP's own would come on top of them.
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }

 private:
  const int before_ = omp_get_max_threads();
};

// Calls `run` for all numbers below `count`, also on XLA's threads.
void Share(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> run) {
  struct Shared {
    std::function<void(int64_t)> run;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all;
    int64_t done = 0;
    std::exception_ptr error;

    void Work() {
      for (int64_t i; (i = next++) < count;) {
        std::exception_ptr caught;
        try {
          const OneThread one;
          run(i);
        } catch (...) {
          caught = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(mutex);
        if (caught) error = caught;
        if (++done == count) all.notify_all();
      }
    }
  };
  const auto shared = std::make_shared<Shared>();
  shared->run = std::move(run);
  shared->count = count;
  for (int64_t i = 1; i < count; ++i) pool.Schedule([shared] { shared->Work(); });
  shared->Work();
  // What other threads have begun; none waits to begin.
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all.wait(lock, [&] { return shared->done == count; });
  if (shared->error) std::rethrow_exception(shared->error);
}

int64_t Threads(const ffi::ThreadPool& pool) {
  return std::max<int64_t>(pool.num_threads(), 1);
}

// What was made for a key, now or before.
template <typename Plan>
const Plan& Kept(const std::vector<Numbers>& key, const std::function<Plan()>& make) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::vector<Numbers>, Plan>;
  const OneThread thread;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, make()).first;
  return found->second;
}

// Equal parts of a length, and a smaller last one.
struct Division {
  int64_t length, some, count;

  Division(int64_t length, int64_t parts, int64_t whole = 1) : length(length) {
    some = std::min(length, ((length + parts - 1) / parts + whole - 1) / whole * whole);
    count = (length + some - 1) / some;
  }
  int64_t last() const { return length - (count - 1) * some; }
};

memory::data_type TypeOf(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::DataType::BF16 ? memory::data_type::bf16
                                                 : memory::data_type::f32;
}

// What lies in a buffer behind some numbers.
memory At(const memory::desc& desc, const ffi::AnyBuffer& x, int64_t begin) {
  const size_t behind = begin * memory::data_type_size(TypeOf(x));
  return memory(desc, Cpu(), static_cast<char*>(x.untyped_data()) + behind);
}

void Reorder(memory from, memory to) {
  const OneThread thread;
  dnnl::stream stream(Cpu());
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
}

// Adds parts of a sum to the first one, always in their order.
void Add(ffi::ThreadPool& pool, const std::vector<memory>& parts) {
  std::vector<float*> all;
  for (const memory& part : parts) {
    all.push_back(static_cast<float*>(part.get_data_handle()));
  }
  const Division size(parts[0].get_desc().get_size() / sizeof(float), Threads(pool));
  Share(pool, size.count, [&](int64_t i) {
    const int64_t end = std::min(size.length, (i + 1) * size.some);
    for (size_t part = 1; part < all.size(); ++part) {
      for (int64_t j = i * size.some; j < end; ++j) all[0][j] += all[part][j];
    }
  });
}

// Convolutions.

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

Part Compile(Direction direction, const memory::dims& image, const memory::dims& output,
             const memory::desc& kernel, memory::data_type type, const Window& window,
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
int64_t TakeRows(int64_t begin, int64_t count, memory::dims* image,
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

Convolution MakeConvolution(Direction direction, int64_t threads,
                            const memory::dims& image, const memory::dims& output,
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
  const Division rows(output[2], divides ? std::max<int64_t>(threads / image[0], 1) : 1);
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

memory::dims Image(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[0], d[3], d[1], d[2]};
}

memory::dims Kernel(const ffi::AnyBuffer& x) {
  const auto d = x.dimensions();
  return {d[3], d[2], d[0], d[1]};
}

void RunConvolution(ffi::ThreadPool& pool, Direction direction, const Numbers& where,
                    const ffi::AnyBuffer& one, const ffi::AnyBuffer& other,
                    const ffi::AnyBuffer& out) {
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
    part.run.execute(
        stream, {{direction == kInput ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC,
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

// Products.

// Numbers along the rows of a product, the terms of its sums, and its columns.
enum Axis { kRows, kTerms, kColumns };
using Axes = std::array<int64_t, 3>;

// A product of matrices, compiled.
struct Product {
  dnnl::primitive run;
  memory::desc left, right, result, scratch;
};

// How far apart the neighbours of a number lie along each axis.
struct Strides {
  Axes left, right, result;
};

Product MakeProduct(const Axes& size, const Strides& strides, memory::data_type type,
                    memory::data_type result) {
  const auto& [m, k, n] = size;
  const auto& [of_left, of_right, of_result] = strides;
  const memory::desc left({m, k}, type, memory::dims{of_left[kRows], of_left[kTerms]});
  const memory::desc right({k, n}, type,
                           memory::dims{of_right[kTerms], of_right[kColumns]});
  const memory::desc product({m, n}, result,
                             memory::dims{of_result[kRows], of_result[kColumns]});
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const dnnl::matmul::primitive_desc made(Cpu(), left, right, product, attr);
  return {dnnl::matmul(made), left, right, product, made.scratchpad_desc()};
}

// Products of the last two axes of each, of which one is contracted.
void RunProduct(ffi::ThreadPool& pool, int64_t left_axis, int64_t right_axis,
                const ffi::AnyBuffer& one, const ffi::AnyBuffer& other,
                const ffi::AnyBuffer& out) {
  const auto shape = [](const ffi::AnyBuffer& x, int64_t axis) {
    return x.dimensions()[x.dimensions().size() - 2 + axis];
  };
  const Axes size{shape(one, 1 - left_axis), shape(one, left_axis),
                  shape(other, 1 - right_axis)};
  const int64_t m = size[kRows], k = size[kTerms], n = size[kColumns];
  const Strides strides{
      left_axis == 1 ? Axes{k, 1, 0} : Axes{1, m, 0},
      right_axis == 0 ? Axes{0, n, 1} : Axes{0, 1, k},
      {n, 0, 1},
  };
  const auto type = TypeOf(one), result = TypeOf(out);
  const int64_t products = out.element_count() / (m * n);

  // The longest axis is divided; sums only of a single product.
  const int64_t longest = std::max_element(size.begin(), size.end()) - size.begin();
  const int64_t axis =
      longest != kTerms || products == 1 ? longest : m > n ? kRows : kColumns;
  // Sixteen numbers of float32 are a register, and a line of the cache.
  const int64_t parts = (Threads(pool) + products - 1) / products;
  const Division division(size[axis], parts, 16);
  const bool summed = axis == kTerms && division.count > 1;
  const auto sums = summed ? memory::data_type::f32 : result;
  const auto product_of = [&](int64_t length) -> const Product& {
    Axes part = size;
    part[axis] = length;
    const Numbers kind{left_axis, right_axis, axis, length, static_cast<int64_t>(type),
                       static_cast<int64_t>(sums)};
    return Kept<Product>({kind, {m, k, n}},
                         [&] { return MakeProduct(part, strides, type, sums); });
  };
  const Product& part = product_of(division.some);
  const Product& last = product_of(division.last());

  // Sums of parts are added in the first one's place.
  const memory whole({{m, n}, result, memory::format_tag::ab}, Cpu(),
                     out.untyped_data());
  std::vector<memory> summands;
  for (int64_t i = 0; summed && i < division.count; ++i) {
    const bool in_place = i == 0 && sums == result;
    const memory::desc plain({m, n}, sums, memory::format_tag::ab);
    summands.push_back(in_place ? whole : memory(plain, Cpu()));
  }
  Share(pool, products * division.count, [&](int64_t i) {
    const int64_t product = i / division.count, place = i % division.count;
    const int64_t begin = place * division.some;
    const Product& made = place + 1 == division.count ? last : part;
    const auto left = At(made.left, one, product * m * k + begin * strides.left[axis]);
    const auto right =
        At(made.right, other, product * k * n + begin * strides.right[axis]);
    const auto found =
        summed ? summands[place]
               : At(made.result, out, product * m * n + begin * strides.result[axis]);
    dnnl::stream stream(Cpu());
    made.run.execute(stream, {{DNNL_ARG_SRC, left},
                              {DNNL_ARG_WEIGHTS, right},
                              {DNNL_ARG_DST, found},
                              {DNNL_ARG_SCRATCHPAD, memory(made.scratch, Cpu())}});
    stream.wait();
  });
  if (!summed) return;
  Add(pool, summands);
  if (sums != result) Reorder(summands[0], whole);
}

ffi::Error Told(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
  return ffi::Error::Success();
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t direction,
                    ffi::Span<const int64_t> where, ffi::AnyBuffer one,
                    ffi::AnyBuffer other, ffi::Result<ffi::AnyBuffer> out) {
  return Told([&] {
    RunConvolution(pool, static_cast<Direction>(direction),
                   Numbers(where.begin(), where.end()), one, other, *out);
  });
}

ffi::Error Multiply(ffi::ThreadPool pool, int64_t left_axis, int64_t right_axis,
                    ffi::AnyBuffer left, ffi::AnyBuffer right,
                    ffi::Result<ffi::AnyBuffer> out) {
  return Told([&] { RunProduct(pool, left_axis, right_axis, left, right, *out); });
}

}  // namespace

// Whether the CPU has instructions for products of bfloat16.
extern "C" int ResnetJaxHasBfloat16() {
  const auto isa = static_cast<int>(dnnl::get_effective_cpu_isa());
  const auto least = static_cast<int>(dnnl::cpu_isa::avx512_core_bf16);
  return (isa & least) == least;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResnetJaxConvolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("direction")
                                  .Attr<ffi::Span<const int64_t>>("where")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResnetJaxMultiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("left_axis")
                                  .Attr<int64_t>("right_axis")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
