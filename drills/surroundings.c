// Makes C library calls fail as on a full or read-only disk or without locks, and sets the clock back. Loaded with
// LD_PRELOAD; surroundings.py controls what fails through a page shared by all processes, named by EFFNET_SHIM.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct page {
    int64_t error;        // errno of failing calls; 0: none fail
    int64_t after;        // calls that succeed first
    int64_t read_only;    // whether removing and renaming also fail
    int64_t count;        // calls so far
    int64_t locks;        // errno of flock; 0: it works
    int64_t clock_after;  // readings of the clock before it is set back
    int64_t clock_back;   // seconds; 0: never
    int64_t clock_count;
    char under[1024];     // the affected folder
};

static struct page *page;

__attribute__((constructor)) static void open_page(void) {
    const char *name = getenv("EFFNET_SHIM");
    int file = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) page = found;
    close(file);
}

#define REAL(name) ((__typeof__(&name))real(&(void *){0}, #name))
static void *real(void **, const char *name) { return dlsym(RTLD_NEXT, name); }

static int is_under(int folder, const char *path) {
    char whole[4200] = "";
    if (path == NULL || path[0] != '/') {
        char link[64];
        ssize_t size;
        if (folder == AT_FDCWD) {
            size = getcwd(whole, 2048) ? (ssize_t)strlen(whole) : -1;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            size = readlink(link, whole, 2048);
        }
        if (size < 0) return 0;
        whole[size] = 0;
        if (path) snprintf(whole + size, 2048, "/%s", path);
    } else {
        snprintf(whole, sizeof whole, "%s", path);
    }
    return strncmp(whole, page->under, strlen(page->under)) == 0;
}

// Whether a call fails: 0 no, 1 yes, 2 yes, as the first one, which may write a part.
static int fails(int folder, const char *path, int needs_room) {
    if (!page || !page->error || (!needs_room && !page->read_only)) return 0;
    int kept = errno, under = is_under(folder, path);
    errno = kept;
    if (!under) return 0;
    int64_t number = __atomic_add_fetch(&page->count, 1, __ATOMIC_SEQ_CST);
    if (number <= page->after) return 0;
    errno = (int)page->error;
    return number == page->after + 1 ? 2 : 1;
}

#define REFUSE(folder, path, room) \
    if (fails(folder, path, room)) return -1

#define OPEN(name, before, arguments, folder)                                        \
    int name before {                                                                \
        mode_t mode = 0;                                                             \
        if (flags & (O_CREAT | O_TMPFILE)) {                                         \
            va_list more;                                                            \
            va_start(more, flags);                                                   \
            mode = va_arg(more, mode_t);                                             \
            va_end(more);                                                            \
        }                                                                            \
        if ((flags & O_CREAT) && fails(folder, path, 1)) return -1;                  \
        if (!(flags & O_CREAT) && (flags & O_ACCMODE) != O_RDONLY && fails(folder, path, 0)) return -1; \
        return REAL(name) arguments;                                                 \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)

#define WRITE(name, before, after, half)           \
    ssize_t name before {                          \
        switch (fails(file, NULL, 1)) {            \
            case 2: if (size > 1) { errno = 0; size /= 2; return REAL(name) half; } return -1; \
            case 1: return -1;                     \
        }                                          \
        return REAL(name) after;                   \
    }
WRITE(write, (int file, const void *data, size_t size), (file, data, size), (file, data, size))
WRITE(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at), (file, data, size, at))
WRITE(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at), (file, data, size, at))
WRITE(writev, (int file, const struct iovec *data, int size), (file, data, size), (file, data, size))

#define CALL(name, before, after, folder, path, room) \
    int name before {                                 \
        REFUSE(folder, path, room);                   \
        return REAL(name) after;                      \
    }
CALL(fsync, (int file), (file), file, NULL, 1)
CALL(fdatasync, (int file), (file), file, NULL, 1)
CALL(ftruncate, (int file, off_t size), (file, size), file, NULL, 1)
CALL(ftruncate64, (int file, off64_t size), (file, size), file, NULL, 1)
CALL(fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size), file, NULL, 1)
CALL(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
CALL(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path, 1)
CALL(rename, (const char *from, const char *path), (from, path), AT_FDCWD, path, 1)
CALL(renameat, (int a, const char *from, int b, const char *path), (a, from, b, path), b, path, 1)
CALL(renameat2, (int a, const char *from, int b, const char *path, unsigned flags), (a, from, b, path, flags), b, path, 1)
CALL(symlink, (const char *from, const char *path), (from, path), AT_FDCWD, path, 1)
CALL(link, (const char *from, const char *path), (from, path), AT_FDCWD, path, 1)
CALL(unlink, (const char *path), (path), AT_FDCWD, path, 0)
CALL(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path, 0)
CALL(rmdir, (const char *path), (path), AT_FDCWD, path, 0)
CALL(utimensat, (int f, const char *path, const struct timespec times[2], int flags), (f, path, times, flags), f, path, 0)
CALL(chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0)

static int allocation(int file) { return fails(file, NULL, 1) ? errno : 0; }
int posix_fallocate(int file, off_t at, off_t size) {
    int error = allocation(file);
    return error ? error : REAL(posix_fallocate)(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    int error = allocation(file);
    return error ? error : REAL(posix_fallocate64)(file, at, size);
}
ssize_t sendfile(int file, int from, off_t *at, size_t size) {
    if (fails(file, NULL, 1)) return -1;
    ssize_t (*call)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
    return call(file, from, at, size);
}
ssize_t copy_file_range(int from, off64_t *a, int file, off64_t *b, size_t size, unsigned flags) {
    REFUSE(file, NULL, 1);
    return REAL(copy_file_range)(from, a, file, b, size, flags);
}

int flock(int file, int how) {
    if (page && page->locks) {
        errno = (int)page->locks;
        return -1;
    }
    return REAL(flock)(file, how);
}

static int64_t back(void) {
    if (!page || !page->clock_back) return 0;
    return __atomic_add_fetch(&page->clock_count, 1, __ATOMIC_SEQ_CST) > page->clock_after ? page->clock_back : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= back();
    return result;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = REAL(gettimeofday)(now, zone);
    now->tv_sec -= back();
    return result;
}
