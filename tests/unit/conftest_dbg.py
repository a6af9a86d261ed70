import signal, traceback, sys, trio, os
def tree(task, ind=0):
    fr=[]
    c=task.coro
    while c is not None:
        f=getattr(c,'cr_frame',None) or getattr(c,'gi_frame',None) or getattr(c,'ag_frame',None)
        if f: fr.append(f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno}:{f.f_code.co_name}")
        c=getattr(c,'cr_await',None) or getattr(c,'gi_yieldfrom',None) or getattr(c,'ag_await',None)
    print(' '*ind+task.name.split('.')[-1], ' > '.join(fr[-6:]), file=sys.__stderr__)
    for n in task.child_nurseries:
        for t in n.child_tasks: tree(t, ind+2)
def h(*a):
    from trio._core._run import GLOBAL_RUN_CONTEXT as G
    r=G.runner
    print("CLOCK", r.clock.current_time(), r.clock_autojump_threshold, r.deadlines.next_deadline(), file=sys.__stderr__)
    tree(r.init_task)
signal.signal(signal.SIGALRM,h); signal.setitimer(signal.ITIMER_REAL, 4, 4)
