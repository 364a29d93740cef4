// CUDA C++ on a CPU. This text stands in front of the source of a kernel, and g++ compiles both.
//
// Every thread of a block is a fiber: it has a stack of its own and runs until it waits. Blocks run
// one after another. What hardware leaves open is done in the most treacherous way allowed: blocks
// come, and a warp runs ahead as far as barriers let it, in an order that the launch chooses,
// asynchronous copies land only when waited for (or at once, by chance, in random order), and shared
// memory holds NaN before each block. Between guard pages, a stray access ends the launch, not
// Python.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include <initializer_list>
#include <type_traits>
#include <utility>

// The language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define UNSEEN __attribute__((no_sanitize("thread")))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::job->threads)
#define gridDim (emulator::job->blocks)

#define EMULATED_VECTORS(T, name, align2, align4)                                               \
  struct __align__(align2) name##2 { T x, y; };                                                 \
  struct name##3 { T x, y, z; };                                                                \
  struct __align__(align4) name##4 { T x, y, z, w; };                                           \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(double, double, 16, 16)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(long long, longlong, 16, 16)
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Fibers and the order that they run in

extern "C" void* realloc(void*, size_t) noexcept;  // stdlib.h has an abs of its own
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];
extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared[];
extern "C" __attribute__((visibility("hidden"))) char __stop_emulated_shared[];
extern "C" __attribute__((visibility("hidden"))) const char _end[];
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {
constexpr unsigned THREADS = 1024, PAGE = 4096, STACK = 32 * PAGE, COPIES = 1024, SIGNALS = 6;
constexpr size_t SHARED = 256 << 10;
enum Order { FORWARD, REVERSED, RANDOM };
enum Kind { READ, WRITE, ATOMIC, FENCE };

struct Kernel {  // what a source exports of each kernel
  void (*function)();
  void (*call)(void (*function)(), void** arguments);
  int limit, arity, sizes[64], pointers[64];
};

struct Room {  // the stacks of the threads, and how many of them are guarded: one for all sources, as
  char* stacks;    // Linux gives a process 65,530 mappings, and a stack is two
  unsigned prepared;
};

struct Job {  // a launch, and its report; Python has the same fields
  const Kernel* kernel;
  void** arguments;
  uint3 blocks, threads;
  size_t shared;
  unsigned order, seed;
  double seconds;             // of processor time, at most
  const char* failure;        // null where all went well, else where and what:
  int signal, line;           // signal: the number, or 0; line: of the waiting call, or 0
  uint3 block, thread;
  uintptr_t address, instruction;  // what was accessed; the offset in this library
  long long switches, copies, multiplications, matrices, conflicts;
  Room* room;
  struct Access* accesses;         // null where nobody asks for them
  long long accessed, accessible;  // how many there are, and how many fit
};

struct Access {
  uintptr_t address, instruction;       // the offset in this library, or 0 where the line is known
  unsigned block, thread, epoch, step;  // how many barriers, and calls of __syncwarp, came before
  int bytes, kind, line, shared;
};

struct Copy {
  void* to;
  const void* from;
  unsigned group;
  bool valid;
  int bytes;
};

struct Fiber {
  void* stack;
  uint3 thread;
  unsigned index, group, first, last;  // groups committed; the range of `copies` not yet landed
  unsigned step;                       // calls of __syncwarp
  int line;                            // where it waits
  Copy* copies;
};

struct Warp {  // each mask has a bit per lane; a lane in none of them runs or has ended
  unsigned ready, barrier, arrived;
  void (*call)(void* const*);
  int line;
  void* lanes[32];
};

__shared__ __attribute__((used)) char none[16];  // the section exists
static Job* job;
static uint3 block;
static Fiber fibers[THREADS], host, *current = &host;
static Warp warps[THREADS / 32];
static unsigned char* dynamic;
static Copy* copies;  // of all fibers, COPIES each
static unsigned live, epoch, position, order[THREADS / 32], turned, generator;
static int barrier_line, votes, vote_result;
static sigjmp_buf escape;

static unsigned chance() { return (generator = generator * 1664525u + 1013904223u) >> 8; }

[[noreturn]] static void fail(const char* what, const Fiber& at) {
  job->failure = what;
  job->line = at.line;
  job->thread = at.thread;
  siglongjmp(escape, 1);
}

static void arrange() {  // the order of the warps until the next barrier
  const unsigned n = (job->threads.x * job->threads.y * job->threads.z + 31) / 32;
  for (unsigned i = 0; i < n; ++i) order[i] = job->order == REVERSED ? n - 1 - i : i;
  turned = job->order == RANDOM ? chance() & 1 : job->order == REVERSED;
  if (job->order == RANDOM)
    for (unsigned i = n - 1; i > 0; --i) std::swap(order[i], order[chance() % (i + 1)]);
  position = 0;
}

static Fiber* next() {  // the fiber to run now; the host's when the block is done
  const unsigned n = (job->threads.x * job->threads.y * job->threads.z + 31) / 32;
  for (;;) {
    for (; position < n; ++position) {
      Warp& w = warps[order[position]];
      if (!w.ready) continue;
      const unsigned lane = turned ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready);
      w.ready &= ~(1u << lane);
      return &fibers[order[position] * 32 + lane];
    }
    if (!live) return &host;
    unsigned waiting = 0;
    for (unsigned i = 0; i < n; ++i) {
      waiting += __builtin_popcount(warps[i].barrier);
      if (warps[i].arrived)
        fail("waits for lanes of its warp that never come to this call",
             fibers[i * 32 + __builtin_ctz(warps[i].arrived)]);
    }
    for (unsigned i = 0; i < n; ++i) {  // all that live have come to the barrier
      warps[i].ready = warps[i].barrier;
      warps[i].barrier = 0;
    }
    vote_result = votes;
    votes = barrier_line = 0;
    ++epoch;
    arrange();
  }
}

static void yield() {
  Fiber *from = current, *to = next();
  if (from == to) return;
  current = to;
  ++job->switches;
  emulator_switch(&from->stack, to->stack);
}

static void entry() {
  job->kernel->call(job->kernel->function, job->arguments);
  --live;
  yield();
}

static int barrier(int line, int vote = 0) {
  Fiber& f = *current;
  f.line = line;
  if (barrier_line && barrier_line != line)
    fail("comes to this barrier while others wait at another one", f);
  barrier_line = line;
  votes += vote;
  warps[f.index / 32].barrier |= 1u << f.index % 32;
  yield();
  return vote_result;
}

// A call that the 32 lanes of a warp make together: each hands in its own data, and the last to
// arrive does the work for all.
template <class Lane>
static void together(Lane& mine, void (*work)(Lane* const*), int line, unsigned mask = ~0u) {
  Fiber& f = *current;
  Warp& w = warps[f.index / 32];
  f.line = line;
  const auto call = reinterpret_cast<void (*)(void* const*)>(work);
  if (mask != ~0u) fail("calls only a part of its warp", f);
  if (w.arrived && (w.call != call || w.line != line))
    fail("comes to this call while lanes of its warp wait in another one", f);
  w.call = call;
  w.line = line;
  w.lanes[f.index % 32] = &mine;
  w.arrived |= 1u << f.index % 32;
  if (~w.arrived) return yield();
  work(reinterpret_cast<Lane* const*>(w.lanes));
  w.arrived = 0;
  w.ready = ~(1u << f.index % 32);
}

UNSEEN static bool is_shared(const void* p, size_t bytes = 16) {
  const auto in = [=](const void* from, size_t n) UNSEEN {
    return uintptr_t(p) - uintptr_t(from) <= n - bytes && n >= bytes;
  };
  return in(dynamic, job->shared) ||
         in(__start_emulated_shared, __stop_emulated_shared - __start_emulated_shared);
}

static bool in(uintptr_t at, const void* from, const void* to) {
  return at - uintptr_t(from) < uintptr_t(to) - uintptr_t(from);
}

// Keeps what the running thread accesses, unless it lies on its stack or is the emulator's own.
UNSEEN static void access(const void* p, int bytes, Kind kind, int line, void* from = nullptr) {
  const uintptr_t at = uintptr_t(p);
  if (!job || !job->accesses || current == &host) return;
  if (in(at, job->room->stacks, job->room->stacks + size_t(THREADS) * STACK)) return;
  if (in(at, copies, copies + COPIES * THREADS)) return;
  const bool shared = is_shared(p, 1);
  if (in(at, __ehdr_start, _end) && !shared || in(at, job, job + 1)) return;
  if (job->accessed == job->accessible) fail("accesses more than can be kept", *current);
  const uint3 &b = block, &n = job->blocks;
  job->accesses[job->accessed++] = {at, from ? uintptr_t(from) - uintptr_t(__ehdr_start) : 0,
      b.x + n.x * (b.y + n.y * b.z), current->index, epoch, current->step, bytes,
      kind, line, shared};
}

UNSEEN static void land(const Copy& c) {
  c.valid ? memcpy(c.to, c.from, c.bytes) : memset(c.to, 0, c.bytes);
}

// Faults

static void caught(int signal, siginfo_t* information, void* context) {
  const auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
  job->signal = signal;
  job->address = uintptr_t(information->si_addr);
  job->instruction = machine->gregs[REG_RIP] - uintptr_t(__ehdr_start);
  Fiber at = *current;
  at.line = 0;
  fail("", at);
}

static void prepare(unsigned threads) {  // stacks, each above a page that no one may touch
  Room& room = *job->room;
  if (!room.stacks)
    room.stacks = static_cast<char*>(mmap(nullptr, size_t(THREADS) * STACK,
        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (!copies)
    copies = static_cast<Copy*>(mmap(nullptr, sizeof(Copy) * COPIES * THREADS,
        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (; room.prepared < threads; ++room.prepared)
    mprotect(room.stacks + size_t(room.prepared) * STACK, PAGE, PROT_NONE);
  const uint3 n = job->threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    // Tops at different places of a page, or all stacks would compete for the same cache lines.
    auto top = reinterpret_cast<void**>(room.stacks + (i + 1) * size_t(STACK) - i % 16 * 192);
    *--top = nullptr;  // entry never returns; this aligns its frame
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f = {top, {i % n.x, i / n.x % n.y, i / (n.x * n.y)}, i, 0, 0, 0, 0, 0, copies + i * COPIES};
    warps[i / 32].ready |= 1u << i % 32;
  }
}

static void run() {
  static auto* memory = static_cast<unsigned char*>(mmap(nullptr, SHARED + PAGE,
      PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(memory + SHARED, PAGE, PROT_NONE);
  const size_t room = (job->shared + 127) / 128 * 128;
  dynamic = memory + SHARED - room;
  generator = job->seed;
  const uint3 n = job->blocks;
  const uint64_t count = uint64_t(n.x) * n.y * n.z;
  static uint64_t* turns;  // the blocks in their order, where they are not numbered by it
  if (job->order == RANDOM) {
    turns = static_cast<uint64_t*>(realloc(turns, count * sizeof *turns));
    for (uint64_t i = 0; i < count; ++i) turns[i] = i;
    for (uint64_t i = count - 1; i > 0; --i) std::swap(turns[i], turns[chance() % (i + 1)]);
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = job->order == RANDOM ? turns[i] : job->order == REVERSED ? count - 1 - i : i;
    block = {unsigned(at % n.x), unsigned(at / n.x % n.y), unsigned(at / n.x / n.y)};
    memset(dynamic, 0xff, room);
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    memset(warps, 0, sizeof warps);
    votes = barrier_line = epoch = 0;
    current = &host;
    live = job->threads.x * job->threads.y * job->threads.z;
    prepare(live);
    arrange();
    yield();
  }
}

extern "C" __attribute__((visibility("default"))) void emulator_launch(Job* requested) {
  static const int signals[SIGNALS] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
  static char stack[16 * PAGE];
  struct sigaction ours = {}, theirs[SIGNALS];
  ours.sa_sigaction = caught;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  stack_t alternative = {}, before;
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  const double s = requested->seconds;
  itimerval limit = {{0, 0}, {time_t(s), suseconds_t((s - time_t(s)) * 1e6)}}, timer;
  const unsigned rounding = __builtin_ia32_stmxcsr();

  job = requested;
  sigaltstack(&alternative, &before);
  for (unsigned i = 0; i < SIGNALS; ++i) sigaction(signals[i], &ours, &theirs[i]);
  setitimer(ITIMER_VIRTUAL, &limit, &timer);
  if (!sigsetjmp(escape, 1)) {
    __builtin_ia32_ldmxcsr(rounding | 0x8040);  // subnormal numbers are zero, as under -ftz=true
    run();
  }
  __builtin_ia32_ldmxcsr(rounding);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  for (unsigned i = 0; i < SIGNALS; ++i) sigaction(signals[i], &theirs[i], nullptr);
  sigaltstack(&before, nullptr);
  job->block = block;
}

template <class... A, size_t... I>
static void invoke(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> Kernel described(void (*kernel)(A...), int limit, int = 0) {
  const auto call = [](void (*k)(), void** arguments) {
    invoke(reinterpret_cast<void (*)(A...)>(k), arguments, std::index_sequence_for<A...>());
  };
  return {reinterpret_cast<void (*)()>(kernel), call, limit, sizeof...(A), {int(sizeof(A))...},
          {std::is_pointer_v<A>...}};
}
}  // namespace emulator

// Behind a source, for each of its kernels: its name and its launch bounds.
#define EMULATED_KERNEL(name, ...)                                                              \
  extern "C" __attribute__((visibility("default"))) const emulator::Kernel emulated_##name;     \
  const emulator::Kernel emulated_##name = emulator::described(name, __VA_ARGS__);

// Under -fsanitize=thread the compiler calls one of these before each access

#define EMULATED_ACCESS(name, parameters, n, kind)                                              \
  extern "C" __attribute__((used)) UNSEEN inline void __tsan_##name parameters {                \
    emulator::access(p, n, emulator::kind, 0, __builtin_return_address(0));                     \
  }
#define EMULATED_ACCESSES(n)                                                                    \
  EMULATED_ACCESS(read##n, (void* p), n, READ)                                                  \
  EMULATED_ACCESS(write##n, (void* p), n, WRITE)                                                \
  EMULATED_ACCESS(unaligned_read##n, (void* p), n, READ)                                        \
  EMULATED_ACCESS(unaligned_write##n, (void* p), n, WRITE)
EMULATED_ACCESSES(1)
EMULATED_ACCESSES(2)
EMULATED_ACCESSES(4)
EMULATED_ACCESSES(8)
EMULATED_ACCESSES(16)
EMULATED_ACCESS(read_range, (void* p, size_t n), n, READ)
EMULATED_ACCESS(write_range, (void* p, size_t n), n, WRITE)
extern "C" __attribute__((used)) inline void __tsan_init() {}

// Calls of a block and of a warp

#define LINE int line = __builtin_LINE()
inline void __syncthreads(LINE) { emulator::barrier(line); }
inline int __syncthreads_count(int p, LINE) { return emulator::barrier(line, p != 0); }
inline int __syncthreads_or(int p, LINE) { return emulator::barrier(line, p != 0) > 0; }
inline int __syncthreads_and(int p, LINE) { return !emulator::barrier(line, p == 0); }
inline void __threadfence(LINE) { emulator::access(nullptr, 0, emulator::FENCE, line); }
inline void __threadfence_block() {}
inline void __syncwarp(unsigned mask = ~0u, LINE) {
  emulator::together<unsigned>(mask, [](unsigned* const*) {}, line, mask);
  ++emulator::current->step;
}

namespace emulator {
template <class T> struct Shuffle {
  T given, received;
  int by, width;
};
// from(lane, by, width): the lane to read, or -1 for its own
template <int (*from)(int, int, int), class T>
static T shuffle(unsigned mask, T value, int by, int width, int line) {
  Shuffle<T> mine{value, value, by, width};
  together<Shuffle<T>>(mine, [](Shuffle<T>* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      const int at = from(i, lanes[i]->by, lanes[i]->width);
      if (at >= 0) lanes[i]->received = lanes[at]->given;
    }
  }, line, mask);
  return mine.received;
}
static int from_exact(int i, int by, int n) { return i / n * n + (by & (n - 1)); }
static int from_xor(int i, int by, int n) { return (i ^ by) / n > i / n ? -1 : (i ^ by) & 31; }
static int from_down(int i, int by, int n) { return i % n + by < n ? i + by : -1; }
static int from_up(int i, int by, int n) { return i % n >= by ? i - by : -1; }
static unsigned ballot(unsigned mask, int predicate, int line) {
  Shuffle<unsigned> mine{predicate != 0, 0, 0, 0};
  together<Shuffle<unsigned>>(mine, [](Shuffle<unsigned>* const* lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= lanes[i]->given << i;
    for (int i = 0; i < 32; ++i) lanes[i]->received = all;
  }, line, mask);
  return mine.received;
}
}  // namespace emulator

#define EMULATED_SHUFFLE(name, rule)                                                            \
  template <class T> inline T name(unsigned mask, T value, int by, int width = 32, LINE) {      \
    return emulator::shuffle<emulator::rule>(mask, value, by, width, line);                     \
  }
EMULATED_SHUFFLE(__shfl_sync, from_exact)
EMULATED_SHUFFLE(__shfl_xor_sync, from_xor)
EMULATED_SHUFFLE(__shfl_down_sync, from_down)
EMULATED_SHUFFLE(__shfl_up_sync, from_up)
inline unsigned __ballot_sync(unsigned m, int p, LINE) { return emulator::ballot(m, p, line); }
inline int __any_sync(unsigned m, int p, LINE) { return emulator::ballot(m, p, line) != 0; }
inline int __all_sync(unsigned m, int p, LINE) { return emulator::ballot(m, p, line) == ~0u; }

// What common.cuh has assembly for, by the contracts given there

template <int BYTES = 16> inline void copy_async(void* shared, const void* global, bool valid, LINE) {
  emulator::Fiber& f = *emulator::current;
  const emulator::Copy copy{shared, global, f.group, valid, BYTES};
  f.line = line;
  if (!emulator::is_shared(shared)) emulator::fail("copies to what is not shared memory", f);
  if ((uintptr_t(shared) | uintptr_t(global)) % BYTES) emulator::fail("copies across 16 bytes", f);
  if (f.last - f.first == emulator::COPIES) emulator::fail("waits for none of its copies", f);
  ++emulator::job->copies;
  emulator::access(shared, BYTES, emulator::WRITE, line);
  if (valid) emulator::access(global, BYTES, emulator::READ, line);
  if (emulator::job->order == emulator::RANDOM && emulator::chance() & 1)
    return emulator::land(copy);
  f.copies[f.last++ % emulator::COPIES] = copy;
}
inline void copy_commit() { ++emulator::current->group; }
template <int N> inline void copy_wait() {
  emulator::Fiber& f = *emulator::current;
  for (; f.first != f.last; ++f.first) {
    const emulator::Copy& copy = f.copies[f.first % emulator::COPIES];
    if (copy.group + N >= f.group) break;
    emulator::access(copy.to, copy.bytes, emulator::WRITE, f.line);
    emulator::land(copy);
  }
}

namespace emulator {
struct Lane {
  unsigned* r;
  const char* row;
};
// Of each of four matrices, 8 x 8 numbers of 16 bits, a lane receives two that are neighbours in a
// row or, turned, in a column.
template <bool TURNED> UNSEEN static void matrices(Lane* const* lanes) {
  ++job->matrices;
  for (int m = 0; m < 4; ++m) {
    int rows[8] = {}, most = 0;  // of each 16 bytes of the banks, one row can be read at a time
    for (int i = 0; i < 8; ++i) {
      const int n = ++rows[uintptr_t(lanes[m * 8 + i]->row) / 16 % 8];
      most = n > most ? n : most;
    }
    job->conflicts += most - 1;
  }
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m)
      for (int h = 0; h < 2; ++h) {
        const int along = l % 4 * 2 + h, row = TURNED ? along : l / 4, column = TURNED ? l / 4 : along;
        memcpy((char*)&lanes[l]->r[m] + 2 * h, lanes[m * 8 + row]->row + 2 * column, 2);
      }
}
template <bool TURNED> static void load(unsigned* r, const void* shared, int line) {
  Lane mine{r, static_cast<const char*>(shared)};
  current->line = line;
  if (!is_shared(shared)) fail("loads what is not shared memory", *current);
  if (uintptr_t(shared) % 16) fail("loads across 16 bytes", *current);
  access(shared, 16, READ, line);
  together<Lane>(mine, matrices<TURNED>, line);
}
}  // namespace emulator
inline void load_matrices(unsigned (&r)[4], const void* shared, LINE) { emulator::load<false>(r, shared, line); }
inline void load_turned(unsigned (&r)[4], const void* shared, LINE) { emulator::load<true>(r, shared, line); }

namespace emulator {
typedef float Row __attribute__((vector_size(32)));
struct Fragments {
  float* d;
  const unsigned* a;
  unsigned b0, b1;
};
static float number(unsigned bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
template <bool BF16>
__attribute__((no_sanitize_undefined)) static void multiply(Fragments* const* lanes) {
  ++job->multiplications;
  constexpr int PAIR = BF16 ? 2 : 1, DEPTH = 8 * PAIR;  // numbers in a register; terms
  float a[16][DEPTH];
  Row b[DEPTH], d[16];
  // number h of the register that holds term t of the first half, or of the second
  const auto factor = [](unsigned bits, int h) {
    return number(BF16 ? (h ? bits & 0xffff0000u : bits << 16) : bits & ~0x1fffu);
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = lanes[l]->d[i];
    for (int h = 0; h < PAIR; ++h) {
      const int term = PAIR * t + h, half = 4 * PAIR;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][term + i / 2 * half] = factor(lanes[l]->a[i], h);
      b[term][g] = factor(lanes[l]->b0, h);
      b[term + half][g] = factor(lanes[l]->b1, h);
    }
  }
  for (int i = 0; i < 16; ++i) {
    Row sum = d[i];
#pragma GCC unroll 16
    for (int k = 0; k < DEPTH; ++k) sum += a[i][k] * b[k];
    d[i] = sum;
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) lanes[l]->d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
}  // namespace emulator
inline void multiply_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, LINE) {
  emulator::Fragments mine{d, a, b0, b1};
  emulator::together<emulator::Fragments>(mine, emulator::multiply<false>, line);
}
inline void multiply_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, LINE) {
  emulator::Fragments mine{d, a, b0, b1};
  emulator::together<emulator::Fragments>(mine, emulator::multiply<true>, line);
}
inline unsigned bf16(float low, float high) {
  unsigned pair = 0;
  for (const float v : {high, low}) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    // to the nearest of the upper halves, of two to the even one; NaN is the GPU's
    bits = v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    pair = pair << 16 | bits;
  }
  return pair;
}

// Numbers

#define EMULATED_CAST(name, From, To)                                                           \
  inline To name(From v) {                                                                      \
    To r;                                                                                       \
    static_assert(sizeof r == sizeof v);                                                        \
    memcpy(&r, &v, sizeof r);                                                                   \
    return r;                                                                                   \
  }
EMULATED_CAST(__int_as_float, int, float)
EMULATED_CAST(__float_as_int, float, int)
EMULATED_CAST(__uint_as_float, unsigned, float)
EMULATED_CAST(__float_as_uint, float, unsigned)
EMULATED_CAST(__longlong_as_double, long long, double)
EMULATED_CAST(__double_as_longlong, double, long long)

#define EMULATED_MATHS(name)                                                                    \
  extern "C" double name(double) noexcept;                                                      \
  extern "C" float name##f(float) noexcept;                                                     \
  inline float name(float v) { return __builtin_##name##f(v); }
EMULATED_MATHS(sqrt)
EMULATED_MATHS(exp)
EMULATED_MATHS(exp2)
EMULATED_MATHS(expm1)
EMULATED_MATHS(log)
EMULATED_MATHS(log2)
EMULATED_MATHS(log10)
EMULATED_MATHS(log1p)
EMULATED_MATHS(sin)
EMULATED_MATHS(cos)
EMULATED_MATHS(tanh)
EMULATED_MATHS(erf)
EMULATED_MATHS(cbrt)
EMULATED_MATHS(fabs)
EMULATED_MATHS(floor)
EMULATED_MATHS(ceil)
EMULATED_MATHS(trunc)
EMULATED_MATHS(round)
EMULATED_MATHS(rint)
#define EMULATED_MATHS_2(name)                                                                  \
  extern "C" double name(double, double) noexcept;                                              \
  extern "C" float name##f(float, float) noexcept;                                              \
  inline float name(float a, float b) { return __builtin_##name##f(a, b); }
EMULATED_MATHS_2(pow)
EMULATED_MATHS_2(fmod)
EMULATED_MATHS_2(copysign)
extern "C" int abs(int) noexcept;
extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float abs(float v) { return fabsf(v); }
inline double abs(double v) { return fabs(v); }
inline long long abs(long long v) { return v < 0 ? -v : v; }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline float rsqrt(float v) { return rsqrtf(v); }
inline double rsqrt(double v) { return 1 / sqrt(v); }
inline bool isnan(float v) { return v != v; }
inline bool isinf(float v) { return fabsf(v) == __builtin_inff(); }
inline bool isfinite(float v) { return fabsf(v) < __builtin_inff(); }

#define EMULATED_LESSER(T, A, B)                                                                \
  inline T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }                                  \
  inline T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
EMULATED_LESSER(int, int, int)
EMULATED_LESSER(unsigned, unsigned, unsigned)
EMULATED_LESSER(unsigned, int, unsigned)
EMULATED_LESSER(unsigned, unsigned, int)
EMULATED_LESSER(long, long, long)
EMULATED_LESSER(unsigned long, unsigned long, unsigned long)
EMULATED_LESSER(long long, long long, long long)
EMULATED_LESSER(unsigned long long, unsigned long long, unsigned long long)
// Of a number and NaN these are the number.
inline float fminf(float a, float b) { return a < b || b != b ? a : b; }
inline float fmaxf(float a, float b) { return a > b || b != b ? a : b; }
inline double fmin(double a, double b) { return a < b || b != b ? a : b; }
inline double fmax(double a, double b) { return a > b || b != b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __saturatef(float v) { return fminf(fmaxf(v, 0), 1); }
inline int __float2int_rd(float v) { return int(floorf(v)); }
inline int __float2int_rn(float v) { return int(rintf(v)); }
inline int __float2int_rz(float v) { return int(v); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(1ull * a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}

// Memory; threads do not interrupt each other here

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
#define EMULATED_ATOMIC(name, result)                                                           \
  template <class T> UNSEEN inline T name(T* p, std::enable_if_t<true, T> v, LINE) {            \
    emulator::access(p, sizeof *p, emulator::ATOMIC, line);                                     \
    const T old = *p;                                                                           \
    *p = result;                                                                                \
    return old;                                                                                 \
  }
EMULATED_ATOMIC(atomicAdd, old + v)
EMULATED_ATOMIC(atomicSub, old - v)
EMULATED_ATOMIC(atomicMin, min(old, v))
EMULATED_ATOMIC(atomicMax, max(old, v))
EMULATED_ATOMIC(atomicOr, old | v)
EMULATED_ATOMIC(atomicAnd, old & v)
EMULATED_ATOMIC(atomicExch, v)
EMULATED_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T>
UNSEEN inline T atomicCAS(T* p, std::enable_if_t<true, T> expected, std::enable_if_t<true, T> v,
                          LINE) {
  emulator::access(p, sizeof *p, emulator::ATOMIC, line);
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}
#undef LINE
