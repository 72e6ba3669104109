"""Programs that share every kind of object with processes elsewhere, and what they print, as they do on one host."""

from __future__ import annotations

import textwrap

IMPORTS = "import os, socket, time\nfrom fiberexec import mp\n"
PROGRAMS = {
    "all kinds of shared objects": """
        def work(jobs, results, lock, total, squares, end, event, barrier, names):
            barrier.wait()
            for number in iter(jobs.get, None):
                with lock:
                    total.value += number
                squares[number] = number * number
                jobs.task_done()
            jobs.task_done()
            names[os.getpid(), socket.gethostname()] = True
            event.wait()
            end.send(end.recv()[::-1])
            results.put(os.uname().nodename)

        jobs, results, lock, event, barrier = mp.JoinableQueue(), mp.Queue(), mp.Lock(), mp.Event(), mp.Barrier(3)
        total, squares = mp.Value("i", 0), mp.Array("q", 10)
        pipes = [mp.Pipe() for _ in range(2)]
        with mp.Manager() as manager:
            names = manager.dict()
            shared = jobs, results, lock, total, squares
            processes = [mp.Process(target=work, args=(*shared, end, event, barrier, names)) for _, end in pipes]
            for process in processes:
                process.start()
            for number in [*range(10), None, None]:
                jobs.put(number)
            barrier.wait()
            jobs.join()
            print(total.value, squares[:], jobs.empty())
            event.set()
            for ours, theirs in pipes:
                theirs.close()
                ours.send("abc")
                print(ours.recv())
            for process in processes:
                process.join()
            print([process.exitcode for process in processes], len(names))
            print(len({results.get() for _ in processes}) == len(processes))
        """,
    "both directions, nested": """
        def inner(items, end):
            items.put(socket.gethostname())
            end.send(end.recv() + 1)

        def outer(results):
            items, (ours, theirs) = mp.Queue(), mp.Pipe()
            results.put((items, ours))
            ours.close()
            process = mp.Process(target=inner, args=(items, theirs))
            process.start()
            theirs.close()
            mp.connection.wait([process.sentinel])
            items.put(socket.gethostname())
            with mp.Pool(1) as pool:
                results.put((process.exitcode, pool.map(lambda number: number * 2, [1, 2, 3])))

        results = mp.Queue()
        process = mp.Process(target=outer, args=(results,))
        process.start()
        items, end = results.get()
        end.send(41)
        print(end.recv())
        try:
            end.recv()
        except EOFError:
            print("the end")
        print(results.get())
        print(len({items.get(), items.get(), socket.gethostname()}))
        process.join()
        print(process.exitcode)
        """,
    "processes that are killed": """
        def hold(jobs, lock, end, barrier, told):
            lock.acquire()
            jobs.get()
            told.set()
            barrier.wait()

        jobs, lock, barrier, told = mp.JoinableQueue(), mp.Lock(), mp.Barrier(2), mp.Event()
        ours, theirs = mp.Pipe()
        jobs.put("job")
        process = mp.Process(target=hold, args=(jobs, lock, theirs, barrier, told))
        process.start()
        theirs.close()
        told.wait()
        while not barrier.n_waiting:
            time.sleep(0.01)
        process.kill()
        process.join()
        print(process.exitcode, lock.acquire(timeout=20), jobs.get(timeout=20), barrier.broken)
        try:
            ours.recv()
        except EOFError:
            print("the end")
        manager = mp.Manager()
        numbers = manager.list()
        manager._process.kill()
        try:
            while True:
                numbers.append(1)
        except mp.managers.ManagerLost:
            print("lost")
        """,
    "a ring": """
        def total(rank, size):
            found = passed = rank
            for _ in range(size - 1):
                passed = mp.ring.current_ring().shift(passed)
                found += passed
            return found, len({member.ip for member in mp.ring.current_ring().members})

        print(mp.Ring(3, total).run())
        """,
    "what stays on its host": """
        def take(value):
            print(value)

        def give(end):
            ours, theirs = socket.socketpair()
            try:
                end.send(ours)
            except Exception as error:
                end.send("stays on its host" in str(error))
            try:
                mp.Array("i", 3).get_obj()
            except TypeError as error:
                end.send("other hosts" in str(error))

        ours, theirs = mp.Pipe()
        process = mp.Process(target=give, args=(theirs,))
        process.start()
        print(ours.recv(), ours.recv())
        process.join()
        process = mp.Process(target=take, args=(mp.get_context("local").Array("i", 3),))
        process.start()
        process.join()
        print(process.exitcode)
        """,
}
EXPECTED = {
    "all kinds of shared objects": "45 [0, 1, 4, 9, 16, 25, 36, 49, 64, 81] True\ncba\ncba\n[0, 0] 2\nTrue\n",
    "both directions, nested": "42\nthe end\n(0, [2, 4, 6])\n3\n0\n",
    "processes that are killed": "-9 True job True\nthe end\nlost\n",
    "a ring": "[(3, 3), (3, 3), (3, 3)]\n",
    "what stays on its host": "True True\n1\n",
}


def program(name: str) -> str:
    """The text of one, without its imports."""
    return textwrap.dedent(PROGRAMS[name]).strip() + "\n"


def all_of_them() -> str:
    """One program that does what all of them do, each in a function of its own."""
    return "".join(
        f"def program_{number}():\n{textwrap.indent(program(name), '    ')}program_{number}()\n"
        for number, name in enumerate(PROGRAMS)
    )
