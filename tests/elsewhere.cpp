// A second device for tests: memory and arithmetic of the CPU under another name, which refuses what a GPU refuses.
#include <ATen/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {
const c10::Device kHere(c10::DeviceType::PrivateUse1, 0);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? ::malloc(bytes) : nullptr;
    return {data, data, &::free, kHere};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { ::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Tensor as_cpu(const at::Tensor& x) {  // the same memory, seen from the CPU
  TORCH_CHECK(!x.is_cpu(), "Expected all tensors to be on the same device, but one is on the CPU");
  c10::Storage storage(c10::Storage::use_byte_size_t(), x.storage().nbytes(), c10::DataPtr(x.storage().mutable_data(), at::kCPU));
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return made;
}
at::Tensor seen(const at::Tensor& x) { return x.is_cpu() ? x : as_cpu(x); }

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  seen(to).copy_(seen(self));
  return to;
}
void grow(const c10::Storage& storage, size_t bytes) {
  c10::DataPtr fresh = allocator.allocate(bytes);
  if (size_t kept = std::min(bytes, storage.nbytes())) ::memcpy(fresh.get(), storage.data(), kept);
  storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}
const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sym_sizes() == size) return self;
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (bytes > self.storage().nbytes()) grow(self.storage(), bytes);
  return self;
}
at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  int64_t length = storage.nbytes() / self.itemsize();
  return set_storage(self, std::move(storage), 0, {length}, {1});
}
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  const_cast<at::Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Scalar scalar(const at::Tensor& self) { return as_cpu(self).item(); }

void elsewhere(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto check = [&](const at::Tensor& x) {
    TORCH_CHECK(!x.defined() || !x.is_cpu() || x.dim() == 0, "Expected all tensors to be on the same device, but ", schema.name(),
                " got one on the CPU beside others elsewhere");
  };
  for (const auto& value : torch::jit::last(*stack, schema.arguments().size())) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) for (const at::Tensor& x : value.toTensorVector()) check(x);
    if (value.isOptionalTensorList()) {  // indices may be on the CPU, as for CUDA
      continue;
    }
  }
  at::native::cpu_fallback(op, stack);
}
at::Tensor unfold(const at::Tensor& x, int64_t d, int64_t size, int64_t step) { return at::native::unfold(x, d, size, step); }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups) {
  auto added = bias && bias->defined() ? std::optional(as_cpu(*bias)) : std::nullopt;
  return at::convolution(as_cpu(x), as_cpu(weight), added, stride, padding, dilation, transposed, more, groups).to(kHere);
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef more, int64_t groups, std::array<bool, 3> wanted) {
  auto [a, b, c] = at::convolution_backward(as_cpu(grad), as_cpu(x), as_cpu(weight), at::OptionalIntArrayRef(c10::IntArrayRef({weight.size(0)})),
                                            stride, padding, dilation, transposed, more, groups, wanted);
  auto moved = [](const at::Tensor& t) { return t.defined() ? t.to(kHere) : t; };
  return {moved(a), moved(b), moved(c)};
}
at::Tensor histc(const at::Tensor& x, int64_t bins, const at::Scalar& low, const at::Scalar& high) {  // integers too
  return as_cpu(x).to(at::kDouble).histc(bins, low, high).to(x.scalar_type()).to(kHere);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&elsewhere>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("histc", &histc);
  m.impl("unfold", &unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    grow(storage, bytes);
  }
};
[[maybe_unused]] const bool registered = [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); return true; }();
}  // namespace
