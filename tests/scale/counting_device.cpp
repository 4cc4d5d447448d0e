// A device made of host memory, for tests: it counts its bytes, fills memory that is not written or
// no longer owned with NaN, and runs the copies of side streams as late as waits allow.
//
// The default stream computes at once, by the CPU's operators. A copy on another stream that is not
// blocking waits in a queue until something waits for it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <deque>
#include <functional>
#include <map>
#include <unordered_map>

namespace {

using namespace at;
constexpr auto KIND = DeviceType::PrivateUse1;
const Device DEVICE(KIND, 0);

// Streams

struct Queue {
  std::deque<std::function<void()>> waiting;
  uint64_t pushed = 0, done = 0;
  void run_to(uint64_t place) {
    while (done < place && !waiting.empty()) {
      auto next = std::move(waiting.front());
      waiting.pop_front();
      ++done;
      next();
    }
  }
};

std::unordered_map<int64_t, Queue> queues;
thread_local int64_t current = 0;
int64_t streams = 1;

void drain(int64_t stream) {
  auto& queue = queues[stream];
  queue.run_to(queue.pushed);
}

bool idle() {
  for (auto& [_, queue] : queues)
    if (!queue.waiting.empty()) return false;
  return true;
}

void push(int64_t stream, std::function<void()> work) {
  if (stream == 0) return work();
  auto& queue = queues[stream];
  queue.waiting.push_back(std::move(work));
  ++queue.pushed;
}

// Memory

struct Count {
  int64_t now = 0, peak = 0;
  void add(int64_t bytes) { peak = std::max(peak, now += bytes); }
};

Count device_bytes, pinned_bytes;
int64_t brought = 0, taken = 0;
std::unordered_map<void*, size_t> sizes;
std::map<void*, size_t> pinned;
std::vector<void*> freed;  // given back when no copy waits that may still read them

void* filled_with_nan(size_t bytes) {
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  return memset(memory, 0xFF, bytes);
}

void free_device(void* memory) {
  if (!memory) return;
  size_t bytes = sizes[memory];
  sizes.erase(memory);
  device_bytes.add(-static_cast<int64_t>(bytes));
  memset(memory, 0xFF, bytes);
  freed.push_back(memory);
  if (!idle()) return;
  for (void* each : freed) free(each);
  freed.clear();
}

struct DeviceAllocator final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes) {
      memory = filled_with_nan(bytes);
      sizes[memory] = bytes;
      device_bytes.add(bytes);
    }
    return {memory, memory, &free_device, DEVICE};
  }
  DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} device_allocator;

void free_pinned(void* memory) {
  if (!memory) return;
  pinned_bytes.add(-static_cast<int64_t>(pinned[memory]));
  pinned.erase(memory);
  free(memory);
}

struct PinnedAllocator final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes) {
      memory = filled_with_nan(bytes);
      pinned[memory] = bytes;
      pinned_bytes.add(bytes);
    }
    return {memory, memory, &free_pinned, Device(DeviceType::CPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} pinned_allocator;

// What PyTorch asks of a device

struct Mark {
  int64_t stream;
  uint64_t place;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  static Stream numbered(int64_t id) { return Stream(Stream::UNSAFE, DEVICE, id); }
  Stream getStream(Device) const override { return numbered(current); }
  Stream getDefaultStream(Device) const override { return numbered(0); }
  Stream getNewStream(Device, int) const override { return numbered(streams++); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return numbered(streams++); }
  Stream exchangeStream(Stream stream) const override {
    auto before = numbered(current);
    current = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Mark*>(event);
  }
  void record(void** event, const Stream& s, const DeviceIndex, const EventFlag) const override {
    if (!*event) *event = new Mark;
    *static_cast<Mark*>(*event) = {s.id(), queues[s.id()].pushed};
  }
  void block(void* event, const Stream& stream) const override {
    auto mark = *static_cast<Mark*>(event);
    push(stream.id(), [mark] { queues[mark.stream].run_to(mark.place); });
  }
  bool queryEvent(void* event) const override {
    auto mark = static_cast<Mark*>(event);
    return queues[mark->stream].done >= mark->place;
  }
  bool queryStream(const Stream& stream) const override {
    return queues[stream.id()].waiting.empty();
  }
  void synchronizeStream(const Stream& stream) const override { drain(stream.id()); }
  void synchronizeEvent(void* event) const override {
    auto mark = static_cast<Mark*>(event);
    queues[mark->stream].run_to(mark->place);
  }
  void synchronizeDevice(const DeviceIndex) const override {
    for (auto& [stream, _] : queues) drain(stream);
  }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  bool isPinnedPtr(const void* address) const override {
    auto after = pinned.upper_bound(const_cast<void*>(address));
    if (after == pinned.begin()) return false;
    auto& [first, bytes] = *std::prev(after);
    return address < static_cast<char*>(first) + bytes;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  Generator getNewGenerator(DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto memory = device_allocator.allocate(bytes);
    if (size_t kept = std::min(bytes, impl->nbytes())) memcpy(memory.get(), impl->data(), kept);
    impl->set_data_ptr(std::move(memory));
    impl->set_nbytes(bytes);
  }
  void init() const override {}
};

// Operators

const DispatchKeySet KEYS(DispatchKey::PrivateUse1);

ScalarType type_of(std::optional<ScalarType> dtype) {
  return dtype.value_or(typeMetaToScalarType(get_default_dtype()));
}

Tensor empty(IntArrayRef shape, std::optional<ScalarType> dtype, std::optional<Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(shape, &device_allocator, KEYS, type_of(dtype), format);
}

Tensor empty_strided(IntArrayRef shape, IntArrayRef stride, std::optional<ScalarType> dtype,
                     std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(shape, stride, &device_allocator, KEYS, type_of(dtype));
}

Tensor on_cpu(const Tensor& t) {
  return from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  bool out = to.device().is_cpu(), in = from.device().is_cpu();
  if (in) brought += from.nbytes();
  if (out) taken += from.nbytes();
  if (!from.numel()) return to;
  Tensor source = in ? from.alias() : on_cpu(from), target = out ? to.alias() : on_cpu(to);
  bool late = non_blocking && current != 0 && (!in || from.is_pinned()) && (!out || to.is_pinned());
  auto copy = [source, target] {
    InferenceMode guard;
    target.copy_(source);
  };
  if (late) {
    push(current, copy);
  } else {
    drain(current);
    NoGradGuard guard;
    target.copy_(source);
  }
  return to;
}

Tensor copy_resized(const Tensor& from, const Tensor& to) {
  const_cast<Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

Scalar item(const Tensor& t) {
  drain(current);
  return on_cpu(t).item();
}

Tensor as_strided(const Tensor& t, SymIntArrayRef shape, SymIntArrayRef stride,
                  std::optional<SymInt> offset) {
  std::optional<int64_t> first;
  if (offset) first = offset->expect_int();
  return native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(shape),
                                       C10_AS_INTARRAYREF_SLOW(stride), first);
}

Tensor view(const Tensor& t, SymIntArrayRef shape) {
  return native::view(t, C10_AS_INTARRAYREF_SLOW(shape));
}

const Tensor& resize(const Tensor& t, IntArrayRef shape, std::optional<MemoryFormat>) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(shape);
  size_t bytes = (impl->numel() + impl->storage_offset()) * t.itemsize();
  if (bytes > t.storage().nbytes()) Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  return t;
}

Tensor& set_storage(Tensor& t, Storage storage, SymInt offset, SymIntArrayRef shape,
                    SymIntArrayRef stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(stride),
                              offset.expect_int());
  return t;
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  drain(current);
  native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_resized);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(KIND, &device_allocator);
  m.def("bytes", [] { return device_bytes.now; });
  m.def("peak", [] { return device_bytes.peak; });
  m.def("reset_peak", [] { device_bytes.peak = device_bytes.now; });
  m.def("pinned_bytes", [] { return pinned_bytes.now; });
  m.def("traffic", [] { return std::make_tuple(brought, taken); });
}
