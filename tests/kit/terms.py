"""One thing, one word: the terms of the trade in English and in Chinese, held over the catalogue and the README."""

from __future__ import annotations

import re
from typing import NamedTuple


class Term(NamedTuple):
    """A thing: what it is called in English (a pattern), and its Chinese words, of which one stands in each twin."""

    english: str
    chinese: tuple[str, ...]


TERMS = (
    # what is traded
    Term(r"trades?", ("成交",)),
    Term(r"tick by tick", ("逐笔",)),
    Term(r"latest trades?", ("最新成交",)),
    Term(r"closing prices?", ("收盘价",)),
    Term(r"final closes?", ("最终收盘价",)),
    Term(r"auctions?", ("竞价",)),
    Term(r"after hours", ("盘后",)),
    Term(r"turnover", ("成交额",)),
    Term(r"volume", ("成交量",)),
    Term(r"(?<!} )candles?", ("K 线",)),  # of a step whose name has it
    Term(r"instruments?", ("品种",)),
    Term(r"markets?", ("市场", "开市", "休市", "收市")),
    Term(r"exchange", ("交易所",)),
    Term(r"watch list", ("自选列表",)),
    # the API
    Term(r"plans?", ("套餐",)),
    Term(r"rate limits?", ("限频",)),
    Term(r"API keys?", ("API 密钥",)),
    Term(r"(?<!dup )(?<!duplicate )keys?", ("密钥",)),  # not of MongoDB's E11000
    Term(r"(?:key|keys) rests?|resting", ("暂停使用",)),
    Term(r"(?:the|a) stream|stream's", ("推送流",)),
    Term(r"subscribed?|subscription", ("订阅",)),
    Term(r"gaps?", ("缺口",)),
    Term(r"polls?|polled|polling", ("轮询",)),
    # where it is kept
    Term(r"spool", ("暂存队列",)),
    Term(r"replica set", ("副本集",)),
    Term(r"sharded cluster", ("分片集群",)),
    Term(r"primary", ("主节点",)),
    Term(r"write concern", ("写关注",)),
    Term(r"collections", ("集合",)),
    Term(r"documents?", ("文档",)),
    Term(r"index", ("索引", "指数")),
    Term(r"local file", ("本地文件",)),
    Term(r"damaged", ("损坏",)),
    Term(r"set aside", ("移开",)),
    Term(r"rescued?|rescues", ("抢救",)),
    # the platform and this machine
    Term(r"platform", ("平台",)),
    Term(r"module hash", ("模块哈希",)),
    Term(r"executions?", ("执行",)),
    Term(r"workflows?", ("工作流",)),
    Term(r"daemon", ("守护进程",)),
    Term(r"state directory", ("状态目录",)),
    Term(r"credentials?", ("凭据",)),
    Term(r"proxy", ("代理",)),
    Term(r"certificates?", ("证书",)),
    Term(r"timed out", ("超时",)),
    Term(r"interrupted", ("中断",)),
    Term(r"older client", ("旧客户端",)),
    Term(r"synthetic", ("模拟",)),
    Term(r"unknown", ("未知", "无法识别", "不认识")),
    Term(r"refused|refuses", ("拒绝",)),
    Term(r"clock", ("时钟",)),
    # what is asked of the reader
    Term(r"see(?= (?:--|[A-Z]))", ("检查", "请看", "详见", "改用")),
    Term(r"expected", ("应", "请写", "不能", "缺少", "需要")),
    Term(r"did you mean", ("是不是",)),
    Term(r"cannot", ("无法", "不能", "不可", "无权")),
)

# What would be a second word for a thing, or is a slip of the pen: by the right one.
WRONG = {
    "成交": "交易记录 成交记录 交易数据",
    "收盘价": "收市价 收盘价格 闭市价",
    "限频": "限流 频率限制 速率限制",
    "额度": "配额",
    "密钥": "令牌 秘钥",
    "API 密钥": "API键 API密匙",
    "推送流": "报价流 数据流 流式 行情流",
    "套餐": "计划 方案",
    "副本集": "复制集 副本组",
    "主节点": "主副本",
    "写关注": "写入关注",
    "暂存队列": "离线队列 缓冲队列",
    "缺口": "间隙 断档 缺失段",
    "自选列表": "关注列表 监视列表 观察列表",
    "守护进程": "后台进程",
    "旧客户端": "老客户端 旧版客户端",
    "凭据": "凭证",
    "哈希": "散列",
    "补齐": "回填 回补",
    "K 线": "蜡烛图 蜡烛 烛台",
    "集合竞价": "拍卖",
    "竞价": "竟价",
    "模拟成交": "合成成交",
    "状态目录": "状态文件夹",
    "工作流": "工作流程",
    "轮询": "轮循",
    "账号": "帐号",
    "登录": "登陆",
    "其他": "其它",
    "阈值": "阀值",
}


def odd_terms(english: str, chinese: str) -> list[str]:
    """Return which words of a sentence have no twin of theirs in its Chinese, and which of that are not ours."""
    plain = re.sub(r"\{[^}]*\}", "{}", english)
    found = [
        f"{said[0]} = {' / '.join(term.chinese)}"
        for term in TERMS
        if (said := re.search(rf"(?<![\w\-./_])(?:{term.english})(?![\w\-/_])", plain))
        and not any(word in chinese for word in term.chinese)
    ]
    return found + forbidden(chinese)


def forbidden(chinese: str) -> list[str]:
    """Return the words of a text that are second words for a thing, each with the right one."""
    return [f"{word}: {right}" for right, words in WRONG.items() for word in words.split() if word in chinese]
