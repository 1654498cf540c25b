// Runs a network: which thread computes what, in which order, and where it lies in memory.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace effnet {
namespace {

int64_t process() {
#if defined(_WIN32)
  return 0;
#else
  return getpid();
#endif
}

// Treats denormals (below 1e-38) as zero during its lifetime: processors take a hundred times as long for them.
class FlushToZero {
#if defined(__x86_64__) || defined(_M_X64)
 public:
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results and inputs
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

constexpr int64_t NONE = -1;
constexpr int STEM = -1;  // the step before block 0

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

// Zeroed memory. Large blocks use huge pages where the system has them, which saves TLB misses as weights are read from
// end to end; and they are mapped, so that they return to the system when freed, since malloc may keep them.
Memory::Memory(size_t bytes) {
  constexpr size_t PAGE = size_t(2) << 20;
  const size_t step = bytes < PAGE ? ALIGNMENT : PAGE, all = bytes + 2 * step;  // untouched pages cost nothing
#if !defined(_WIN32)
  if (step == PAGE) {
    pages_ = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages_ == MAP_FAILED) throw std::bad_alloc();
    mapped_ = all;
  }
#endif
  if (!mapped_ && !(pages_ = calloc(all, 1))) throw std::bad_alloc();
  begin = (char*)(((uintptr_t)pages_ + step - 1) / step * step);
#if defined(MADV_HUGEPAGE)
  if (mapped_) madvise(begin, (bytes + step - 1) / step * step, MADV_HUGEPAGE);
#endif
}
Memory::~Memory() {
#if !defined(_WIN32)
  if (mapped_) {
    unguard(pages_, mapped_);  // these addresses may be mapped again
    munmap(pages_, mapped_);
  }
#endif
  if (!mapped_) free(pages_);
}

// The threads that compute an image together, usually just one. Each thread leads a team of its own; if no image is
// left, it helps another team.
struct Engine::Team {
  Context context;
  Members members;
  Barrier barrier;
  std::vector<std::atomic<int>> next;  // the next item of each phase
  std::vector<double> seconds;
  double since = 0;
  // Written by the first thread; the others read them after a barrier or after they are admitted.
  int64_t image = NONE;
  int threads = 1;  // of the next step: the stem, a block or the head
  int step = STEM;  // where admitted threads begin
};

struct Engine::Batch {
  Engine* engine;
  const uint8_t* pixels;
  float *logits, *features;
  int64_t images;
  std::atomic<int64_t> next{0};
  bool together;  // fewer images than threads: the first thread leads and all others help

  int64_t take() {
    const int64_t image = next.fetch_add(1);
    return image < images ? image : NONE;
  }
};

Engine::Engine(Layout layout, int threads, const float* const* arrays, const int64_t* lengths, int64_t count)
    : layout_(std::move(layout)), threads_(threads), process_(process()), pool_(new Pool) {
  Arena counted;
  layout_.place_weights(counted);
  weights_.reset(new Memory(counted.used()));
  Arena placed(weights_->begin);
  layout_.place_weights(placed);
  layout_.fill_weights(arrays, lengths, count);

  const int phases = layout_.phases();
  for (int i = 0; i < threads; i++) {
    Workspace space;
    teams_.emplace_back(new Team);
    Team& team = *teams_.back();
    Arena size;
    layout_.place_context(size, team.context);
    layout_.place_workspace(size, space);
    work_.emplace_back(new Memory(size.used()));
    Arena work(work_.back()->begin);
    layout_.place_context(work, team.context);
    layout_.place_workspace(work, space);
    spaces_.push_back(space);
    team.next = std::vector<std::atomic<int>>(phases);
    team.seconds.resize(phases);
  }
}

Engine::~Engine() {
  if (process() != process_) pool_.release();  // its threads are in another process
}

void Engine::run(const uint8_t* pixels, int64_t images, float* logits, float* features) {
  if (process() != process_) {  // a fork copies everything but the threads
    pool_.release();
    pool_.reset(new Pool);
    process_ = process();
  }
  std::lock_guard<std::mutex> lock(pool_->busy);
  Batch batch;
  batch.engine = this;
  batch.pixels = pixels;
  batch.logits = logits;
  batch.features = features;
  batch.images = images;
  batch.together = images < threads_;
  if (batch.together) teams_[0]->members.open();
  pool_->run(threads_, &Engine::work, &batch);
}

void Engine::work(void* argument, int thread) {
  const FlushToZero flush;
  Batch& batch = *(Batch*)argument;
  Engine& engine = *batch.engine;
  Team& own = *engine.teams_[thread];
  if (thread == 0 || !batch.together) {
    own.image = batch.take();
    if (batch.together)
      own.members.wait(engine.threads_);
    else
      own.members.open();
    own.threads = own.members.present();
    while (own.image != NONE) engine.forward(batch, own, thread, 0, STEM);
    own.members.close();
  }
  for (int i = 1; i < engine.threads_; i++) {
    Team& other = *engine.teams_[(thread + i) % engine.threads_];
    if (const int place = other.members.join())
      for (int step = other.step; other.image != NONE; step = STEM) engine.forward(batch, other, thread, place, step);
  }
}

// Computes a team's image from step `begin` on. `space`: index of the thread's workspace; `place`: its number in the
// team.
void Engine::forward(Batch& batch, Team& team, int space, int place, int begin) {
  const Layout& net = layout_;
  const Kernels& k = *net.kernels;
  Context& context = team.context;
  Workspace& own = spaces_[space];
  const int64_t index = team.image;
  const int blocks = (int)net.blocks.size();
  int threads = 1;
  int phase = begin == STEM ? 0 : 1 + 3 * begin;
  if (place == 0) team.since = now();

  // The first thread counts the threads present before a step's last barrier, and admits them after it.
  const auto count = [&] {
    if (place == 0) team.threads = team.members.present();
  };
  const auto enter = [&](int step) {
    threads = team.threads;
    if (place != 0) return;
    team.step = step;
    team.members.admit(threads);
  };
  // Free threads take the items of a phase; the next phase begins when all items are done.
  const auto share = [&](int items, auto&& work) {
    if (threads == 1)
      for (int i = 0; i < items; i++) work(i);
    else
      for (int i; (i = team.next[phase].fetch_add(1, std::memory_order_relaxed)) < items;) work(i);
    team.barrier.wait(threads);
  };
  const auto done = [&] {
    if (place == 0) {
      const double time = now();
      team.seconds[phase] = time - team.since;
      team.since = time;
    }
    phase++;
  };
  const auto part = [](int whole, int i, int parts) { return (int)((int64_t)whole * i / parts); };

  const size_t vector = (size_t)k.lanes * k.element;  // bytes
  const auto add_tile = [&](Soon& soon, const Product& p, int tile) {
    if (p.outputs && tile < p.tiles) soon.add(p.weights, p.depth * vector, p.first(tile), p.first(tile + 1));
  };
  // in each of `rounds`, fetches a part of the rows that this thread reads in a later phase
  const auto add_share = [&](Soon& soon, const void* weights, size_t row, int rows, int round, int rounds) {
    const int first = part(rows, place, threads), all = part(rows, place + 1, threads) - first;
    soon.add(weights, row, first + part(all, round, rounds), first + part(all, round + 1, rounds));
  };

  if (begin == STEM) {
    enter(STEM);
    if (place == 0)
      for (auto& each : team.next) each.store(0, std::memory_order_relaxed);
    team.barrier.wait(threads);
    count();
    const uint8_t* pixels = batch.pixels + index * net.stem.size * net.stem.size * net.stem.channels;
    const int strips = threads == 1 ? 1 : std::min(net.stem.size, 4 * threads);
    share(strips, [&](int i) {
      k.image(net.stem, pixels, context.image, part(net.stem.size, i, strips), part(net.stem.size, i + 1, strips));
    });
    if (net.stem_map) {
      const int rows = net.stem.output;
      if (threads > 1) {
        if (place == 0) team.next[phase].store(0, std::memory_order_relaxed);
        team.barrier.wait(threads);
      }
      share(rows, [&](int i) { k.stem(net.stem, net.activation, context.image, context.maps[1], i, i + 1); });
    }
    done();
  }

  for (int n = std::max(begin, 0); n < blocks; n++) {
    enter(n);
    const void* x = n || net.stem_map ? context.maps[(n + 1) % 2] : context.image;
    const Block& b = net.blocks[n];
    void* y = context.maps[n % 2];
    // chunks of channels; chunks left over after equal shares for all threads are split by rows
    const int whole = b.chunks / threads * threads, parts = std::min(threads, BANDS);
    const int rounds = (b.chunks + threads - 1) / threads;
    share(whole + (b.chunks - whole) * parts, [&](int i) {
      const bool alone = i < whole;
      const int chunk = alone ? i : whole + (i - whole) / parts, q = alone ? 0 : (i - whole) % parts;
      const int round = chunk / threads, next = std::min(chunk + threads, b.chunks - 1);
      Soon soon;
      if (b.source == Source::expand) {  // the next chunk's weights, then a share of those of the next phases
        if (next > chunk) add_tile(soon, b.expand, next);
        add_share(soon, b.project.weights, b.project.depth * vector, b.project.vectors, round, rounds);
        if (b.squeeze) {
          add_share(soon, b.squeeze_weights, b.vectors * vector, b.squeeze, round, rounds);
          add_share(soon, b.excite_weights, b.squeeze * vector, b.vectors, round, rounds);
        }
      }
      k.depthwise(b, net.stem, x, context, own, chunk, part(BANDS, q, alone ? 1 : parts),
                  part(BANDS, q + 1, alone ? 1 : parts), soon);
    });
    done();
    if (b.squeeze) {
      const int fours = (b.squeeze + 3) / 4;
      k.squeeze(b, context, own, std::min(b.squeeze, 4 * part(fours, place, threads)),
                std::min(b.squeeze, 4 * part(fours, place + 1, threads)));
      team.barrier.wait(threads);
      k.excite(b, context, part(b.vectors, place, threads), part(b.vectors, place + 1, threads));
      team.barrier.wait(threads);
    }
    done();
    count();
    Soon soon;
    const Product& after = n + 1 < blocks ? net.blocks[n + 1].expand : net.head.product;
    add_tile(soon, after, std::min(place, after.tiles - 1));
    const int tiles = b.project.tiles, pixels = b.pixels();
    // If the weights are larger than their inputs, each thread computes the tiles that it has prefetched.
    const bool by_tiles = tiles % threads == 0 && pixels < b.out_lanes;
    const int tile = by_tiles ? part(tiles, place, threads) : 0,
              tile_end = by_tiles ? part(tiles, place + 1, threads) : tiles;
    const int groups =
        std::max((pixels + GROUP - 1) / GROUP, by_tiles || threads == 1 ? 1 : std::min(pixels, 2 * threads));
    const auto project = [&](int i) {
      const int pixel = part(pixels, i, groups), end = part(pixels, i + 1, groups);
      k.project(b, x, y, context, own, tile, tile_end, pixel, end, soon);
      soon = Soon();
    };
    if (by_tiles) {
      for (int i = 0; i < groups; i++) project(i);
      team.barrier.wait(threads);
    } else {
      share(groups, project);
    }
    done();
  }

  enter(blocks);
  const void* x = context.maps[(blocks + 1) % 2];
  const Head& head = net.head;
  float* map = batch.features ? batch.features + index * head.pixels * head.features : nullptr;
  const int tiles = head.product.outputs ? head.product.tiles : head.in_lanes / k.lanes;
  share(tiles, [&](int i) {
    Soon soon;
    add_tile(soon, head.product, i + threads);
    k.head(head, x, context, map, i, soon);
  });
  done();
  if (place == 0) team.image = batch.take();
  count();
  const int parts = threads == 1 ? 1 : std::min(head.classes, 4 * threads);
  share(parts, [&](int i) {
    k.classify(head, context, batch.logits + index * head.classes, part(head.classes, i, parts),
               part(head.classes, i + 1, parts));
  });
  done();
}

int64_t Engine::phases(double* seconds, int64_t count) const {
  const std::vector<double>& found = teams_[0]->seconds;
  std::copy_n(found.begin(), std::min<int64_t>(count, (int64_t)found.size()), seconds);
  return (int64_t)found.size();
}

}  // namespace effnet
